"""A damaged checkpoint of a Mamba-2 or of a hybrid gets one error, which names the tensor or the field."""

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from scalar_decay_models import build_mamba2

from hf_compressm.architectures import state_sizes
from hf_compressm.architectures.scalar_decay.balanced import BALANCED_CLASSES
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.loading import load_language_model

CONV, FEATURES = 64 + 2 * 2 * 16, 64 + 64 + 2 * 2 * 16 + 4  # rows of a layer's convolution, and of its in_proj


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A stock model, one with 5 and 7 balanced states, and a hybrid whose files name its tensors in their own way."""
    folder = tmp_path_factory.mktemp("sources")
    build_mamba2().save_pretrained(folder / "axis")
    plain = build_mamba2().config.to_dict()
    config = BALANCED_CLASSES[transformers.Mamba2Config](**plain | {"balanced_state_size": [5, 7]})
    BALANCED_CLASSES[transformers.Mamba2ForCausalLM](config).save_pretrained(folder / "balanced")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "layers_block_type": ["mamba", "mlp"]}
    sizes |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}
    hybrid = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**sizes))
    hybrid.save_pretrained(folder / "hybrid")
    return {kind: folder / kind for kind in ("axis", "balanced", "hybrid")}


@pytest.fixture
def copy(sources, tmp_path):
    return lambda kind: Path(shutil.copytree(sources[kind], tmp_path / kind))


def change_tensor(folder: Path, ending: str, layer: int, rows: int | None) -> None:
    """Keep some rows of a tensor; None removes it."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if f"layers.{layer}." in name and name.endswith(ending))
    tensor = tensors.pop(name)
    if rows is not None:
        tensors[name] = tensor[:rows].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value != "gone"}))


def test_sound_ones_pass(sources):
    assert check_checkpoint(sources["axis"]) == {0: 16, 1: 16}
    assert check_checkpoint(sources["balanced"]) == {0: 5, 1: 7}
    for kind, folder in sources.items():
        assert state_sizes(load_language_model(folder)) == check_checkpoint(folder), kind


@pytest.mark.parametrize(
    ("kind", "tensor", "layer", "rows", "message"),
    [
        ("axis", "conv1d.bias", 1, None, "layer 1 has no conv1d.bias"),
        ("axis", "conv1d.weight", 0, None, "layer 0 has no conv1d.weight"),
        ("axis", "in_proj.weight", 0, None, "layer 0 has no in_proj.weight"),
        ("axis", "conv1d.weight", 0, CONV - 1, "conv1d.weight has 63 entries for states, which come by 4"),
        ("axis", "conv1d.weight", 0, 60, "conv1d.weight has -4 entries for states"),
        (
            "axis",
            "conv1d.weight",
            0,
            CONV - 4,
            f"conv1d.bias has the shape ({CONV},); {CONV - 4} entries",
        ),
        ("axis", "in_proj.weight", 0, 9, f"in_proj.weight has the shape (9, 32); {FEATURES} entries belong to 16"),
        ("axis", "conv1d.bias", 0, 7, f"conv1d.bias has the shape (7,); {CONV} entries belong to 16 states"),
        ("balanced", "B_proj", 0, None, "layer 0 has no B_proj"),
        ("balanced", "C_proj", 0, 1, "C_proj has the shape (1, 5, 16), expected (2, 5, 16)"),
        ("balanced", "B_proj", 1, 1, "B_proj has the shape (1, 7, 16), expected (2, 7, 16)"),
    ],
)
def test_damaged_tensors_are_refused(copy, kind, tensor, layer, rows, message):
    folder = copy(kind)
    change_tensor(folder, tensor, layer, rows)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        check_checkpoint(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("axis", {"state_size": 8}, "layer 0 has 16 states, config.json says state_size = 8"),
        ("axis", {"state_size": "16"}, "state sizes ['16', '16']"),
        ("axis", {"n_groups": 4}, "layer 0 has 8 states, config.json says state_size = 16"),
        ("axis", {"n_groups": 0}, "config.json has n_groups = 0; allowed: a whole number from 1"),
        ("axis", {"n_groups": "gone"}, "config.json has n_groups = None"),
        ("axis", {"num_heads": [4]}, "config.json has num_heads = [4]"),
        ("hybrid", {"mamba_head_dim": True}, "config.json has mamba_head_dim = True"),
        ("balanced", {"balanced_state_size": [5]}, "it gives 2 layers the state sizes [5]"),
        ("balanced", {"balanced_state_size": [5, 7, 7]}, "it gives 2 layers the state sizes [5, 7, 7]"),
        ("balanced", {"balanced_state_size": [5, 0]}, "the state sizes [5, 0]"),
        ("balanced", {"balanced_state_size": 5}, "layer 1 has 7 states, config.json says balanced_state_size = 5"),
        ("balanced", {"balanced_state_size": None}, "layer 0 has 5 states, config.json says balanced_state_size = 16"),
        ("balanced", {"state_size": 12}, "B_proj has the shape (2, 5, 16), expected (2, 5, 12)"),
        ("balanced", {"state_size": "gone"}, "config.json has state_size = None"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copy, kind, changes, message):
    folder = copy(kind)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        check_checkpoint(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("kind", ["balanced", "hybrid"])
def test_other_tensors_that_do_not_fit_are_named_when_it_is_loaded(copy, kind):
    folder = copy(kind)
    change_tensor(folder, "A_log", 0, 3)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.A_log.*\b3\b.*\b4\b"):
        load_language_model(folder)
