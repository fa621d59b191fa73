"""A step of generation refuses a cache of other sizes, past whose end its kernel would read."""

import pytest
import torch
from conftest import build_model

from hf_compressm.surgery.shrink_and_grow import pad_state, shrink_state
from hf_compressm.theory.plan import Selection


def cut(model):
    shrink_state(model, {index: Selection(torch.arange(4)) for index in range(2)})


def grow(model):
    pad_state(model, 32)


@pytest.mark.parametrize("resize", [cut, grow])
@torch.no_grad()
def test_a_cache_of_before_a_resize_is_refused(blocks, resize):
    model = build_model().eval()
    cache = model(blocks[:2, :9], use_cache=True).cache_params
    resize(model)
    with pytest.raises(ValueError, match=r"states of shape \(2, 64, 16\), a step .* before a cut"):
        model(blocks[:2, 9:10], cache_params=cache, use_cache=True)
    cache = model(blocks[:2, :9], use_cache=True).cache_params
    assert model(blocks[:2, 9:10], cache_params=cache, use_cache=True).logits.isfinite().all()
