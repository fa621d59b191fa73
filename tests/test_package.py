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

# Imports run one way: a file may import from those before it.
ORDER = """
    hankel settling kernels.operators kernels.torch_scan selective criteria kernels.cpp_scan kernels.triton_scan
    kernels.dispatch kernels.scan kernels.installation kernels state_fit layouts options config schedule files
    engines.processes engines.sharded engines.wrappers engines.data_parallel engines.engine engines.training_arguments
    engines optimizers per_layer.modeling_compressm_mamba per_layer recording resizing surgery
    lru.linear_recurrence lru.configuration_lru lru.modeling_lru lru
    calibration measurement recall masking activations refit selective_analysis time_invariant_analysis analysis
    allocation records history reduction
    monitor trigger adoption checkpoint snapshot safety_net announcements
    plotting.figures plotting.spectra plotting.trajectories plotting.settling plotting.runs plotting.results plotting
    mamba_ssm_format loading export pictures model_card hub publication attachment callback
    environment text cli
""".split()
MATHEMATICS = {
    "hankel",
    "settling",
    "kernels.operators",
    "kernels.torch_scan",
    "selective",
    "criteria",
    "lru.linear_recurrence",
}

USE = """
    import sys, torch
    import hf_compressm
    assert hf_compressm.__file__.startswith(sys.argv[1]), hf_compressm.__file__
    from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
    from hf_compressm import CompreSSMConfig, analyze, compress
    from hf_compressm.cli import main
    from hf_compressm.history import History, load_history, save_history
    from hf_compressm.model_card import write_model_card

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=16, num_hidden_layers=2))
    batches = [{"input_ids": torch.randint(0, 64, (2, 16))} for _ in range(8)]
    report = analyze(model, batches, CompreSSMConfig(target_state_size=4))
    history = History(config={}, events=[compress(model, report)])
    model.save_pretrained("model")
    save_history(history, "model")
    assert AutoModelForCausalLM.from_pretrained("model").config.state_size == 4
    assert load_history("model").state_sizes == [4, 4]
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


def imports_of(module: str) -> set[str]:
    """Names of our own modules, and of foreign packages, that a module imports."""
    path = ROOT / "hf_compressm" / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / "hf_compressm" / module / "__init__.py"
    package = module.split(".")[:-1] if path.name != "__init__.py" else module.split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found.add(target)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found - {""}


def test_every_file_has_its_place():
    files = {
        str(path.relative_to(ROOT / "hf_compressm").with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in (ROOT / "hf_compressm").rglob("*.py")
    }
    assert files - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module):
    own = imports_of(module) & set(ORDER)
    assert own <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", sorted(MATHEMATICS))
def test_the_mathematics_knows_torch_only(module):
    foreign = imports_of(module) - set(ORDER) - set(sys.stdlib_module_names)
    assert foreign <= {"torch"}
    assert imports_of(module) & set(ORDER) <= MATHEMATICS


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
        "install_scan",
        "parameter_groups",
        "push_compressed",
        "uninstall_scan",
    ]
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in hf_compressm.__all__)


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install")]
    (test_command,) = [line for line in commands if "pytest" in line]
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()
