"""The card of a reduced Mamba-2 or hybrid: the basis, what a server keeps, how it is loaded, and what is pushed."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, build_model, build_trainer
from hub_fixtures import NAME, check_card
from huggingface_hub import snapshot_download
from scalar_decay_models import build_bamba, build_mamba2
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress
from hf_compressm.architectures import state_sizes
from hf_compressm.architectures.remote_code import CODE_FILES, needs_code
from hf_compressm.sharing.hub import push_compressed
from hf_compressm.sharing.model_card import CARD
from hf_compressm.storage.history import History

PER_LAYER_CODE, BALANCED_CODE = CODE_FILES
INNER, TAPS = 64, 4  # channels of a layer, and of its convolution the taps; of two groups
BUILD = {"mamba2": build_mamba2, "bamba": build_bamba}


def reduced(kind: str, basis: str, batches, **changes):
    model = BUILD[kind](**changes)
    config = CompreSSMConfig(target_state_size=4, basis=basis)
    history = History(config.to_dict(), events=[compress(model, analyze(model, batches, config))])
    return model, history


@pytest.mark.parametrize("basis", ["axis", "balanced"])
@pytest.mark.parametrize("kind", BUILD)
def test_the_card_counts_what_a_server_keeps(hub, batches, kind, basis):
    before = sum(parameter.numel() for parameter in BUILD[kind]().parameters())
    model, history = reduced(kind, basis, batches)
    push_compressed(model, NAME, history)
    files = hub.files(NAME)
    text = files[CARD].decode()
    check_card(text)
    state = [2 * 4 * INNER * size for size in (16, 4)]  # of two layers; a layer of attention has none
    channels = [INNER + 2 * 2 * size for size in (16, 4 if basis == "axis" else 16)]
    inputs = [2 * 2 * of_layer * (TAPS - 1) for of_layer in channels]
    assert f"| state per sequence (float32) | {state[0] / 1024:.1f} KiB | {state[1] / 1024:.1f} KiB |" in text
    shown = [f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count} B" for count in inputs]
    assert f"| past inputs of convolutions per sequence (bfloat16) | {shown[0]} | {shown[1]} |" in text
    assert f"| sequences in the same memory | 1 | {(state[0] + inputs[0]) / (state[1] + inputs[1]):.1f} |" in text
    now = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {before / 1e6:.2f} M | {now / 1e6:.2f} M |" in text
    assert ("Keys and values of attention" in text) == (kind == "bamba")
    assert f'(basis "{basis}")' in text and model_type_of(kind) in text
    assert (BALANCED_CODE in files) == ("trust_remote_code=True" in text) == (basis == "balanced")
    auto_map = json.loads(files["config.json"]).get("auto_map", {})
    assert auto_map.keys() == (set() if basis == "axis" else {"AutoConfig", "AutoModel", "AutoModelForCausalLM"})
    assert all(name.startswith(BALANCED_CODE.removesuffix(".py")) for name in auto_map.values())
    assert ("It is a plain" in text) == (basis == "axis")
    assert ("do not know such layers" in text) == (basis == "balanced")
    assert ("--to mamba_ssm" in text) == ((kind, basis) == ("mamba2", "axis"))
    assert "--to uniform" not in text  # there is one size


def model_type_of(kind: str) -> str:
    return {"mamba2": "Mamba-2", "bamba": "Bamba"}[kind]


def test_parameters_before_a_cut_are_those_of_the_plain_model(hub, batches):
    large = {"hidden_size": 128, "num_heads": 16, "state_size": 128}  # so that the card's two decimals tell
    before = sum(parameter.numel() for parameter in build_mamba2(**large).parameters())
    for basis in ("axis", "balanced"):
        model, history = reduced("mamba2", basis, batches[:2], **large)
        now = sum(parameter.numel() for parameter in model.parameters())
        push_compressed(model, NAME, history)
        text = hub.files(NAME)[CARD].decode()
        assert f"| parameters | {before / 1e6:.2f} M | {now / 1e6:.2f} M |" in text
        assert abs(now - before) > 4e3


def test_trainer_pushes_the_code_of_a_balanced_model(hub, dataset, tmp_path):
    config = CompreSSMConfig(target_state_size=4, calibration_batches=2, basis="balanced")
    callback = CompreSSMCallback(config, CompreSSMSchedule(end=0.5, events=1))
    options = {"push_to_hub": True, "hub_model_id": NAME, "hub_strategy": "every_save", "save_steps": 4}
    trainer = build_trainer(
        tmp_path / "out", dataset, [], max_steps=4, save_strategy="steps", model=build_mamba2(), **options
    )
    callback.attach(trainer)
    trainer.train()
    trainer.push_to_hub()
    folder = Path(snapshot_download(NAME))
    assert (folder / BALANCED_CODE).exists() and "trust_remote_code=True" in (folder / CARD).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.balanced_state_size == 4


def test_which_classes_need_code():
    assert needs_code("CompreSSMMambaForCausalLM") and needs_code("CompreSSMZamba2ForCausalLM")
    assert not needs_code("MambaForCausalLM") and not needs_code("GenerationMixin") and not needs_code("Zamba2Model")
    assert not needs_code(type(build_model()).__name__)


@pytest.mark.parametrize("name", ["mamba2-kjv-8", "mamba2-kjv-8-balanced"])
def test_the_reference_models_load_as_their_cards_say(hub, name):
    folder = ROOT / "model_cards" / name
    model, read = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(read[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(state_sizes(model).values()) == {8} and needs_code(type(model).__name__) == name.endswith("balanced")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    check_card((folder / CARD).read_text())
    tokens = AutoTokenizer.from_pretrained(folder)("And God said", return_tensors="pt")
    assert model(**tokens, labels=tokens["input_ids"]).loss < 6  # chance is ln 2560 = 7.8
