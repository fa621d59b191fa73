"""A checkpoint or a history that is damaged, or that contradicts its weights, is refused when it is read."""

import json

import pytest
from conftest import LAYERS, build_trainer
from trainer_callbacks import cutting_callback
from transformers import AutoModelForCausalLM, MambaConfig

from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import load_history


@pytest.fixture
def checkpoint(tmp_path, dataset):
    """A checkpoint after both cuts."""
    callback = cutting_callback()
    build_trainer(tmp_path, dataset, [callback], save_strategy="steps", save_steps=12).train()
    return tmp_path / "checkpoint-12"


def edit_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_checkpoint_passes(checkpoint):
    assert check_checkpoint(checkpoint) == {0: 4, 1: 4}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="gpt2")), ValueError, "type 'gpt2'"),
        (
            lambda f: edit_json(f / "config.json", lambda c: c.update(state_size=16)),
            ValueError,
            "says state_size = 16",
        ),
        (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json is truncated or damaged"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            ValueError,
            "model.safetensors is truncated or damaged",
        ),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, damage, error, message):
    damage(checkpoint)
    with pytest.raises(error, match=message):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "compressm.json").write_text("{"), "is truncated or damaged"),
        (lambda f: edit_json(f / "compressm.json", lambda c: c.update(format_version=99)), "history format 99"),
        (
            lambda f: edit_json(f / "compressm.json", lambda c: c["events"].pop()),
            "of which compressm.json knows nothing",
        ),
        (lambda f: edit_json(f / "compressm.json", lambda c: c["events"][0].pop("kept_states")), "malformed history"),
        (lambda f: (f / "hsv.safetensors").write_bytes(b"no"), "is damaged"),
    ],
)
def test_a_damaged_history_is_refused(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        load_history(checkpoint)


def test_a_history_that_contradicts_the_weights_is_refused(checkpoint, dataset):
    def change(content):
        event = content["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["exported_history"]["events"][-1]
        event |= {"state_sizes_after": [5] * LAYERS, "kept_states": [list(range(5))] * LAYERS}

    edit_json(checkpoint / "trainer_state.json", change)
    trainer = build_trainer(checkpoint.parent, dataset, [cutting_callback()])
    with pytest.raises(ValueError, match=r"history ends with state sizes {0: 5, 1: 5}, its weights have {0: 4, 1: 4}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_stock_loading_of_mismatched_sizes_is_an_error_and_not_random_weights(checkpoint):
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(checkpoint, config=MambaConfig.from_pretrained(checkpoint, state_size=16))
