"""The wheel holds all that a user needs; files keep their order; CI runs the README's command."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

import hf_compressm

PACKAGE = ROOT / "hf_compressm"

# Imports run one way: a room may import from those before it. The mathematics knows torch only.
FLOORS = """
    private_api theory kernels engines config architectures surgery storage analysis report reduction plotting sharing
    training console __init__
""".split()

USE = """
    import sys, torch
    import hf_compressm
    assert hf_compressm.__file__.startswith(sys.argv[1]), hf_compressm.__file__
    from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
    from hf_compressm import CompreSSMConfig, analyze, compress
    from hf_compressm.console.cli import main
    from hf_compressm.storage.history import History, load_history, save_history
    from hf_compressm.sharing.model_card import write_model_card

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=16, num_hidden_layers=2))
    batches = [{"input_ids": torch.randint(0, 64, (2, 16))} for _ in range(8)]
    report = analyze(model, batches, CompreSSMConfig(target_state_size=4))
    history = History(config={}, events=[compress(model, report)])
    model.save_pretrained("model")
    save_history(history, "model")
    assert AutoModelForCausalLM.from_pretrained("model").config.state_size == 4
    assert load_history("model").state_sizes == {0: 4, 1: 4}
    assert "| state size N | 16 | 4 |" in str(write_model_card("model", "me/model"))
    assert main(["env"]) == 0
    print("used", hf_compressm.__version__)
"""


def test_the_wheel_alone_analyses_compresses_saves_and_loads(tmp_path):
    source = tmp_path / "source"  # a clean copy: a build folder in the checkout would leak into the wheel
    shutil.copytree(ROOT / "hf_compressm", source / "hf_compressm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "wheel")]
    subprocess.run([*pip, "wheel", str(source), *options], check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").iterdir()
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    use = [sys.executable, "-c", textwrap.dedent(USE), str(site)]
    environment = os.environ | {"PYTHONPATH": str(site)}
    used = subprocess.run(use, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert used.endswith(f"used {hf_compressm.__version__}\n")


def room_of(path) -> str:
    """A package or a file of the top floor: its name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path) -> tuple[set[str], set[str]]:
    """Our own rooms, and the foreign packages, that a file imports."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = path.relative_to(PACKAGE).parts[: -node.level]
            names = [*parents, *(node.module or "").split(".")] if node.module or parents else []
            own |= {names[0]} if names else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return own, foreign - set(sys.stdlib_module_names)


def test_the_house_has_few_rooms_and_short_files():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17, sorted(path.name for path in entries)
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == set(FLOORS)
    lengths = {
        path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cpp", ".h")
    }
    assert not {str(path): length for path, length in lengths.items() if length > 400}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own, foreign = imports_of(path)
    floor = FLOORS.index(room_of(path))
    assert own <= set(FLOORS[: floor + 1])
    if room_of(path) == "theory":
        assert foreign <= {"torch"}
    if room_of(path) == "kernels":
        assert "transformers" not in foreign


def test_the_public_names_are_those_of_the_readme():
    assert sorted(hf_compressm.__all__) == [
        "CardDetails",
        "CompreSSMCallback",
        "CompreSSMConfig",
        "CompreSSMSchedule",
        "LRUConfig",
        "LRUForSequenceClassification",
        "LRUModel",
        "analyze",
        "compress",
        "env_report",
        "hankel",
        "install_scan",
        "parameter_groups",
        "prepare",
        "push_compressed",
        "uninstall_scan",
    ]
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in hf_compressm.__all__)


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install")]
    (test_command,) = [line for line in commands if "pytest" in line]
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()
