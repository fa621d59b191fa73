"""The cards of a reduced Mamba and its kin count what a server keeps for a sequence."""

import pytest
import torch
from conftest import build_model
from hub_fixtures import check_card
from mamba1_models import BUILDERS

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import state_layers
from hf_compressm.sharing.model_card import CARD, write_model_card
from hf_compressm.storage.history import History, save_history

BUILD = BUILDERS | {"mamba": build_model, "compressm_mamba": build_model}


def cached(model) -> tuple[int, int]:
    """The bytes of states that a sequence leaves in the cache, and of past inputs, but for the newest."""
    cache = model(input_ids=torch.arange(8).view(1, 8), use_cache=True)
    layers = (cache.get("cache_params") or cache.past_key_values).layers
    kept = [layers[mixer.layer_idx] for mixer in state_layers(model).values()]
    states = sum(4 * state.numel() for each in kept for state in each.recurrent_states.values())
    return states, sum(2 * past[..., 1:].numel() for each in kept for past in each.conv_states.values())


def text_of(count: int) -> str:
    return f"{count:,} B" if count < 1024 else f"{count / 1024:.{0 if count >= 10240 else 1}f} KiB"


@pytest.mark.parametrize("kind", BUILD)
def test_the_card_counts_what_a_server_keeps(hub, kind, batches, tmp_path):
    model = BUILD[kind]()
    parameters, before = sum(each.numel() for each in model.parameters()), cached(model)
    options = {"allocation": "per_layer", "skip_layers": [1]} if kind == "compressm_mamba" else {}
    config = CompreSSMConfig(**{"target_state_size": 4} | options)
    history = History(config.to_dict(), events=[compress(model, analyze(model, batches, config))])
    assert model.config.model_type == kind
    model.save_pretrained(tmp_path)
    save_history(history, tmp_path)
    write_model_card(tmp_path, "me/model")
    text, after = (tmp_path / CARD).read_text(), cached(model)
    check_card(text)
    assert after[0] < before[0] and after[1] == before[1] > 0
    assert f"| state per sequence (float32) | {text_of(before[0])} | {text_of(after[0])} |" in text
    inputs = text_of(after[1])
    assert f"| past inputs of convolutions per sequence (bfloat16) | {inputs} | {inputs} |" in text
    assert f"| sequences in the same memory | 1 | {sum(before) / sum(after):.1f} |" in text
    now = sum(each.numel() for each in model.parameters())
    assert f"| parameters | {parameters / 1e6:.2f} M | {now / 1e6:.2f} M |" in text
    assert ("Keys and values of attention" in text) == (kind in ("jamba", "zamba"))
