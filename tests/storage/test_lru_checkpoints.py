"""A cut LRU is an ordinary checkpoint, and a model takes whatever sizes a checkpoint has."""

import json

import pytest
import torch
from conftest import assert_identical, build_lru, weights_of
from transformers import AutoModelForSequenceClassification

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import state_sizes
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes

N = 16


def test_a_cut_model_is_an_ordinary_checkpoint(tmp_path, lru, lru_batches):
    compress(lru, analyze(lru, None, CompreSSMConfig(tolerance=0.05)))
    sizes = list(state_sizes(lru).values())
    lru.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.state_size == sizes and check_checkpoint(tmp_path) == dict(enumerate(sizes))
    assert torch.equal(
        loaded(input_ids=lru_batches[0]["input_ids"]).logits, lru(input_ids=lru_batches[0]["input_ids"]).logits
    )
    assert analyze(loaded, None, CompreSSMConfig(tolerance=0.05)).state_sizes_before == dict(enumerate(sizes))


def test_a_model_adopts_any_sizes_layer_by_layer_from_the_weights_it_is_given():
    source, model = build_lru(state_size=[N - 1, N + 1]), build_lru(seed=1)
    handle = adopt_checkpoint_sizes(model)
    model.load_state_dict(source.state_dict())
    assert model.config.state_size == [N - 1, N + 1]
    assert_identical(weights_of(model), weights_of(source))
    handle.remove()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(build_lru().state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_config(folder, state_size=[9, 5]), "layer 0 has 5 states, config.json says .* 9"),
        (lambda folder: edit_config(folder, state_size=5), "layer 1 has 9 states, config.json says .* 5"),
        (lambda folder: edit_config(folder, state_size=[5, 9, 9]), r"gives 2 layers the state sizes"),
        (lambda folder: edit_config(folder, model_type="gpt2"), "type 'gpt2'; supported: mamba, compressm_mamba, "),
        (lambda folder: cut_file(folder / "model.safetensors"), "truncated or damaged"),
        (lambda folder: cut_file(folder / "config.json"), "truncated or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, message):
    build_lru(state_size=[5, 9]).save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path) == {0: 5, 1: 9}
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path)


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_file(path) -> None:
    path.write_bytes(path.read_bytes()[:-20])
