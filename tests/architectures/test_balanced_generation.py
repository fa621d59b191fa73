"""A balanced model generates as it computes: cached or not, in beams, with static caches, in padded batches."""

import pytest
import torch
from balanced_models import CASES, N, build_cut, cache_for, mixers_of, states_of, tokens

every_case = pytest.mark.parametrize("case", CASES)  # logits are of the size of 5
ALONE = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def generate(model, ids, **options) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **(ALONE | options))


@torch.no_grad()
def logits_in_parts(model, ids, cache: dict, lengths: list[int]) -> torch.Tensor:
    """The logits of tokens that are given one part after the other."""
    parts = []
    for part in torch.arange(ids.shape[1])[None].split(lengths, 1):
        # Bamba counts positions from 0 in each call, unless it is told; Mamba-2 has none.
        positions = {} if "cache_params" in cache else {"position_ids": part}
        parts.append(model(input_ids=ids[:, part[0]], **cache, **positions).logits)
    return torch.cat(parts, 1)


@every_case
@pytest.mark.parametrize("sizes", ["few", "all", "mixed"])
def test_tokens_in_parts_give_the_logits_of_the_whole(case, sizes):
    """Into one cache: a part, single tokens, a part again; the state is heads · p · r numbers."""
    count = {"zamba2": 3}.get(case, 2)
    kept = {"few": [3] * count, "all": [N] * count, "mixed": [2, None, 5][:count]}[sizes]
    model, ids = build_cut(case, kept), tokens()
    cache = cache_for(model)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits_in_parts(model, ids, cache, [7, 1, 1, 1, 9]), expected, rtol=0, atol=1e-4)
    for state, mixer, size in zip(states_of(cache, model), mixers_of(model), kept, strict=True):
        assert state.shape == (2, mixer.num_heads, mixer.head_dim, size or N)


@every_case
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_generation_is_the_same_with_a_cache_and_without(case, options):
    model, ids = build_cut(case), tokens(length=7)
    cached = generate(model, ids, **options)
    assert cached.shape[1] == 15
    assert torch.equal(cached, generate(model, ids, num_beams=options.get("num_beams", 1), use_cache=False))


@every_case
def test_a_left_padded_sequence_is_computed_as_if_alone(case):
    model, ids, left = build_cut(case), tokens(), 5
    ids[0, :left] = 0
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    alone = ids[:1, left:]
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[:1, left:]
        torch.testing.assert_close(padded, model(input_ids=alone).logits, rtol=0, atol=1e-4)
    new = generate(model, ids, attention_mask=mask)[:1, ids.shape[1] :]
    assert torch.equal(new, generate(model, alone)[:, alone.shape[1] :])


@every_case
def test_a_cache_that_can_be_taken_back_computes_the_same(case):
    """It records what went into the convolution, so single tokens do not take the one-step convolution."""
    model, ids = build_cut(case), tokens()
    cache = cache_for(model)
    (layers,) = (each.layers for each in cache.values() if hasattr(each, "layers"))
    for mixer in mixers_of(model):
        layers[mixer.layer_idx].activate_past_recording()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits_in_parts(model, ids, cache, [7, 1, 1, 10]), expected, rtol=0, atol=1e-4)
    assert all(layers[mixer.layer_idx].conv_states[0].shape[-1] == ids.shape[1] for mixer in mixers_of(model))
