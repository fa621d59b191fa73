"""An export is the same model in another form: it loads where it should, and is there whole or not at all."""

import json
import os
import textwrap

import pytest
import torch
from conftest import assert_identical, contents, copy_of, weights_of
from processes import run_program
from safetensors.torch import load_file, save_file
from transformers import MambaForCausalLM

from hf_compressm.architectures import state_sizes
from hf_compressm.architectures.selective.per_layer import CompreSSMMambaForCausalLM
from hf_compressm.console.cli import main
from hf_compressm.storage import export
from hf_compressm.storage.export import export_bf16, export_mamba_ssm, export_sharded, export_uniform
from hf_compressm.storage.history import load_history
from hf_compressm.storage.loading import load_language_model
from hf_compressm.storage.mamba_ssm_format import read_mamba_ssm
from hf_compressm.surgery.shrink_and_grow import pad_state, shrink_state
from hf_compressm.theory.plan import Selection

SOURCES = {"uniform": [4, 4], "per_layer": [8, 16]}  # state sizes
EXPORTERS = {
    "uniform": export_uniform,
    "bf16": export_bf16,
    "sharded": lambda source, target: export_sharded(source, target, "20KB"),
    "mamba_ssm": export_mamba_ssm,
}
EVERY = pytest.mark.parametrize("name", EXPORTERS)

STOCK = """
    import sys
    sys.modules["hf_compressm"] = None  # importing it would fail
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM

    root, *folders = sys.argv[1:]
    ids, logits = load_file(root + "/ids.safetensors")["ids"], {}
    for folder in folders:
        trusted = {"trust_remote_code": True} if folder.startswith("sharded-per_layer") else {}
        model, info = AutoModelForCausalLM.from_pretrained(f"{root}/{folder}", output_loading_info=True, **trusted)
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert trusted or type(model) is MambaForCausalLM
        assert AutoTokenizer.from_pretrained(f"{root}/{folder}", **trusted).eos_token == "<end>"
        with torch.no_grad():
            logits[folder] = model.eval().float()(input_ids=ids).logits
    save_file(logits, root + "/logits.safetensors")
"""


def logits_of(folder, ids) -> torch.Tensor:
    with torch.no_grad():
        return load_language_model(folder).float()(input_ids=ids).logits


def cut_back(model, sizes: list[int]) -> None:
    shrink_state(model, {index: Selection(torch.arange(size)) for index, size in enumerate(sizes)})


def test_what_is_exported_loads_in_transformers_alone_with_the_same_logits(models, tmp_path, blocks):
    """A uniform and a padded one, bf16, and sharded ones, of which that with a size per layer needs its own code."""
    ids, expected = blocks[:3, :21].clone(), {}
    for source in SOURCES:
        for name in ("uniform", "sharded") + (("bf16",) if source == "uniform" else ()):
            EXPORTERS[name](models / source, tmp_path / f"{name}-{source}")
            expected[f"{name}-{source}"] = logits_of(models / source, ids)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    run_program(textwrap.dedent(STOCK), tmp_path, *expected)
    for name, found in load_file(tmp_path / "logits.safetensors").items():
        tolerance = 0.1 if name.startswith("bf16") else 1e-6 * expected[name].abs().max().clamp_min(1).item()
        torch.testing.assert_close(found, expected[name], rtol=0, atol=tolerance)


@EVERY
@pytest.mark.parametrize("source", SOURCES)
def test_every_export_says_what_it_wrote_and_leaves_its_source_alone(models, tmp_path, blocks, name, source):
    before = contents(models / source)
    exported = EXPORTERS[name](models / source, tmp_path / "deep" / "target")
    assert contents(models / source) == before
    assert os.listdir(tmp_path) == ["deep"] and os.listdir(tmp_path / "deep") == ["target"]
    sizes = [max(SOURCES[source])] * 2 if name in ("uniform", "mamba_ssm") else SOURCES[source]
    written, dtype = load_language_model(exported.folder), load_language_model(models / source).dtype
    assert exported.state_sizes == dict(enumerate(sizes)) == state_sizes(written)
    assert written.dtype is (torch.bfloat16 if name == "bf16" else dtype)
    largest = logits_of(models / source, blocks[:2]).abs().max()
    found = (logits_of(exported.folder, blocks[:2]) - logits_of(models / source, blocks[:2])).abs().max()
    assert found <= (0.05 if name == "bf16" else 1e-6) * largest
    assert (exported.difference > 1e-4) == (written.dtype is not dtype) and exported.largest_logit > 0
    assert str(exported.folder) in str(exported) and f"N = {', '.join(map(str, sorted(set(sizes))))};" in str(exported)
    if name == "mamba_ssm":
        assert not (exported.folder / "compressm.json").exists()
    else:
        assert load_history(exported.folder).to_dict() == load_history(models / source).to_dict()
    assert (exported.folder / "tokenizer.json").read_bytes() == (models / source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("source", SOURCES)
def test_sharding_keeps_every_bit_and_the_code_that_a_model_needs(models, tmp_path, source):
    export_sharded(models / source, tmp_path / "sharded", "20KB")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors") if path.name[:3] == "mod")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and sorted(set(index["weight_map"].values())) == shards
    left, right = load_language_model(models / source), load_language_model(tmp_path / "sharded")
    assert_identical(weights_of(left), weights_of(right))
    assert (tmp_path / "sharded" / "modeling_compressm_mamba.py").exists() == (source == "per_layer")


def test_padding_is_undone_exactly_by_cutting_what_was_added(models, tmp_path):
    original = load_language_model(models / "per_layer")
    export_uniform(models / "per_layer", tmp_path / "padded", 24)
    padded = load_language_model(tmp_path / "padded")
    assert type(padded) is MambaForCausalLM and state_sizes(padded) == {0: 24, 1: 24}
    cut_back(padded, SOURCES["per_layer"])
    assert type(padded) is CompreSSMMambaForCausalLM
    assert_identical(weights_of(padded), weights_of(original))


def test_mamba_ssm_and_back_keeps_every_bit(models, tmp_path):
    export_mamba_ssm(models / "uniform", tmp_path / "uniform")
    original, back = (load_language_model(folder) for folder in (models / "uniform", tmp_path / "uniform"))
    assert_identical(weights_of(back), weights_of(original))
    padded = load_language_model(models / "per_layer")
    pad_state(padded, 16)
    export_mamba_ssm(models / "per_layer", tmp_path / "per_layer")
    back = read_mamba_ssm(tmp_path / "per_layer")
    assert_identical(weights_of(back), weights_of(padded))
    cut_back(back, SOURCES["per_layer"])
    assert_identical(weights_of(back), weights_of(load_language_model(models / "per_layer")))
    config = json.loads((tmp_path / "per_layer" / "config.json").read_text())
    assert config["ssm_cfg"]["d_state"] == 16 and "model_type" not in config


def test_an_export_can_be_exported_again(models, tmp_path, blocks):
    """bf16, sharded, padded, in mamba_ssm's format, and from there."""
    steps = ["bf16", "sharded", "uniform", "mamba_ssm", "uniform"]
    source = models / "per_layer"
    for i, name in enumerate(steps):
        source = EXPORTERS[name](source, tmp_path / str(i)).folder
        assert load_language_model(source).dtype is torch.bfloat16
    first, last = (logits_of(tmp_path / str(i), blocks[:2]) for i in (0, len(steps) - 1))
    torch.testing.assert_close(last, first, rtol=0, atol=1e-6 * first.abs().max().item())


@EVERY
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_target_that_holds_something_is_refused_and_untouched(models, tmp_path, name, kind):
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="target exists and is not an empty folder; give another"):
        EXPORTERS[name](models / "uniform", target)
    assert contents(tmp_path) == before


def test_an_empty_target_is_taken(models, tmp_path):
    (tmp_path / "target").mkdir()
    export_uniform(models / "uniform", tmp_path / "target")
    assert load_language_model(tmp_path / "target").config.state_size == 4


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (lambda source, target: export_uniform(source, target, 8), "16"),  # below the largest layer
        (lambda source, target: export_uniform(source, target, 0), "cannot enlarge to 0 states"),
        (lambda source, target: export_uniform(source, target, -4), "-4"),
        (lambda source, target: export_sharded(source, target, "1GB"), "max_shard_size = 1GB; the model fits into"),
        (lambda source, target: export_sharded(source, target, "much"), "much"),
        (lambda source, target: export_uniform(source / "none", target), "none"),
    ],
)
def test_an_impossible_export_leaves_nothing(models, tmp_path, failing, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        failing(models / "per_layer", tmp_path / "new" / "target")
    assert not any(path.is_file() for path in tmp_path.rglob("*")) and not (tmp_path / "new" / "target").exists()


@pytest.mark.parametrize("target", ["source", "source/inside", "source/../source"])
def test_the_source_is_no_target(models, tmp_path, target):
    copy_of(models / "uniform", tmp_path / "source")
    before = contents(tmp_path / "source")
    if target == "source/inside":
        export_uniform(tmp_path / "source", tmp_path / target)
    else:
        with pytest.raises(FileExistsError):
            export_uniform(tmp_path / "source", tmp_path / target)
    assert {name: data for name, data in contents(tmp_path / "source").items() if name[:6] != "inside"} == before


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    from hf_compressm.console.cli import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the weights have more
    for form in ("uniform", "bf16", "sharded", "mamba_ssm"):
        code = main(["export", sys.argv[1], sys.argv[2] + "/target", "--to", form, "--max-shard-size", "60KB"])
        assert code == 1, (form, code)
"""


def test_a_full_disk_leaves_nothing(models, tmp_path):
    run = run_program(textwrap.dedent(FULL_DISK), models / "uniform", tmp_path)
    lines = [line for line in run.stderr.splitlines() if line.startswith("hf-compressm export failed: ")]
    assert len(lines) == 4 and "Traceback" not in run.stderr
    assert contents(tmp_path) == {}


def damage_weights(folder) -> None:
    """One number of one state, in whichever file the weights are."""
    if (folder / "pytorch_model.bin").exists():
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        tensors["backbone.layers.1.mixer.D"][5] += 1
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        if "backbone.layers.1.mixer.D" in tensors:
            tensors["backbone.layers.1.mixer.D"][5] += 1
            save_file(tensors, file, {"format": "pt"})


@EVERY
@pytest.mark.parametrize("as_command", [False, True])
def test_an_export_with_a_wrong_weight_is_caught_and_not_kept(models, tmp_path, monkeypatch, capsys, name, as_command):
    """The weights are changed on the disk between the write and the check."""
    write = export.write_mamba_ssm if name == "mamba_ssm" else MambaForCausalLM.save_pretrained

    def damaging(model, folder, *args, **kwargs):
        write(model, folder, *args, **kwargs)
        damage_weights(folder)

    monkeypatch.setattr(export, "write_mamba_ssm", damaging)
    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", damaging)
    if as_command:
        options = ["--to", name, "--max-shard-size", "20KB"]
        assert main(["export", str(models / "uniform"), str(tmp_path / "target"), *options]) == 2
        assert "gives other logits than its source" in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match=r"export of .*uniform gives other logits than its source, by .*not kept"):
            EXPORTERS[name](models / "uniform", tmp_path / "target")
    assert contents(tmp_path) == {}


def test_weights_that_became_nan_are_caught(models, tmp_path, monkeypatch):
    write = MambaForCausalLM.save_pretrained

    def damaging(model, folder, *args, **kwargs):
        model.lm_head.weight.data[0] = float("nan")
        write(model, folder, *args, **kwargs)

    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", damaging)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        export_uniform(models / "uniform", tmp_path / "target")
    assert contents(tmp_path) == {}


def test_an_interrupted_export_leaves_nothing(models, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.shutil, "copy", interrupted)  # after the weights are there
    with pytest.raises(KeyboardInterrupt):
        export_uniform(models / "uniform", tmp_path / "target")
    assert contents(tmp_path) == {}
