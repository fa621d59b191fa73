"""A step of generation as one operator for each mixer: it equals Transformers' own, and stands aside where it must."""

from contextlib import nullcontext

import pytest
import torch
from balanced_models import CASES, build_cut, build_stock, cache_for
from conftest import from_origin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM, set_seed
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block, Mamba2Mixer

from hf_compressm import install_scan, uninstall_scan
from hf_compressm.architectures.scalar_decay.balanced import BalancedMixer

WITHOUT = ("falcon_h1", "falcon_h1_norm")  # their mixers have multipliers


@from_origin
@torch.no_grad()
def build_mamba(seed: int = 0, **options) -> MambaForCausalLM:
    """Random enough that every parameter matters."""
    set_seed(seed)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=61, hidden_size=40, num_hidden_layers=2, state_size=7, **options)
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.add_(0.3 * torch.randn_like(parameter) if "mixer" in name else 0)
    return model


BUILDERS = {
    "mamba": build_mamba,
    "mamba2": lambda: build_stock(case="mamba2"),
    "balanced": lambda: build_cut("mamba2"),
}


@pytest.fixture(autouse=True)
def uninstalled_scan():
    """Against conftest, which installs it: here each test says itself when the scan is installed."""
    uninstall_scan()
    yield
    uninstall_scan()


class CountedSteps(TorchDispatchMode):
    """It counts the operators that take a step of a whole mixer."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "mixer_step" in str(function)
        return function(*args, **(kwargs or {}))


def generated(model, batch=2, prompt=5, steps=3, context=nullcontext, cache=None):
    """The logits of some single steps after a prompt, and how many of the operators took them."""
    ids = torch.randint(1, 60, (batch, prompt + steps), generator=torch.Generator().manual_seed(batch))
    cache = cache or cache_for(model)
    with torch.no_grad():
        model(ids[:, :prompt], **cache)
    with CountedSteps() as counted, context():
        logits = [model(ids[:, t : t + 1], **cache).logits for t in range(prompt, prompt + steps)]
    return torch.cat(logits, 1).detach(), counted.count


def compared(model, **options):
    """How far the steps are from Transformers' own, and how many operators took them."""
    expected, none = generated(model, **options)
    assert none == 0
    install_scan()
    found, count = generated(model, **options)
    uninstall_scan()
    return relative_error(found, expected), count


def relative_error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 20])
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_batch_size_gives_the_logits_of_transformers_own(kind, batch):
    error, count = compared(BUILDERS[kind]().eval(), batch=batch, context=torch.no_grad)
    assert error < 1e-5 and count == 3 * 2


@pytest.mark.parametrize("options", [{"use_bias": True}, {"use_conv_bias": False}], ids=str)
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_layers_may_have_biases_or_none(kind, options):
    model = build_mamba(**options) if kind == "mamba" else build_stock(case=kind, **options)
    error, count = compared(model.eval(), context=torch.no_grad)
    assert error < 1e-5 and count == 3 * 2


@pytest.mark.parametrize("build", [lambda case: build_stock(case=case), build_cut], ids=["plain", "balanced"])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_serves_in_all_mixers_that_have_mamba_2s_forward(case, build):
    error, count = compared(build(case), context=torch.no_grad)
    assert error < 1e-5 and (count > 0) == (case not in WITHOUT)


class Adapter(nn.Linear):
    """It is a layer of another package, which adds something of its own."""

    def forward(self, x):
        return super().forward(x) + 1


def with_an_adapter(model):
    for module in model.modules():
        if isinstance(module, (MambaMixer, Mamba2Mixer)):
            module.in_proj.__class__ = Adapter


def with_a_hook(model):
    for module in model.modules():
        if isinstance(module, (MambaMixer, Mamba2Mixer)):
            module.out_proj.register_forward_hook(lambda *args: args[-1] + 1)


def with_a_hook_on_the_mixer(model):
    for module in model.modules():
        if isinstance(module, (MambaMixer, Mamba2Mixer)):
            module.register_forward_pre_hook(lambda mixer, given: (given[0] + 1, *given[1:]))


def with_a_mixer_of_ones_own(model):
    class Own(type(model.backbone.layers[0].mixer)):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states * 2, *args, **kwargs)

    for block in model.backbone.layers:
        block.mixer.__class__ = Own


STAND_ASIDE = {
    "gradients": {"context": nullcontext},
    "autocast": {"context": lambda: torch.autocast("cpu", torch.bfloat16)},
    "an adapter": {"change": with_an_adapter},
    "a hook": {"change": with_a_hook},
    "bfloat16": {"change": lambda model: model.bfloat16()},
    "float64": {"change": lambda model: model.double()},
    "another scan": {"environment": "torch"},
}


@pytest.mark.parametrize("reason", STAND_ASIDE)
@pytest.mark.parametrize("kind", BUILDERS)
def test_it_stands_aside_where_something_else_has_a_part(kind, reason, monkeypatch):
    case = {"context": torch.no_grad, "change": lambda model: None, "environment": ""} | STAND_ASIDE[reason]
    monkeypatch.setenv("HF_COMPRESSM_SCAN", case["environment"])
    model = BUILDERS[kind]().eval()
    case["change"](model)
    error, count = compared(model, context=case["context"])
    assert count == 0 and error < (0.1 if reason in ("autocast", "bfloat16") else 1e-5)


@pytest.mark.parametrize("change", [with_a_hook_on_the_mixer, with_a_mixer_of_ones_own])
@pytest.mark.parametrize("kind", BUILDERS)
def test_what_stands_between_a_block_and_its_mixer_is_called(kind, change):
    """The mixer alone is one operator then."""
    model = BUILDERS[kind]().eval()
    plain, _ = generated(model, context=torch.no_grad)
    change(model)
    assert relative_error(generated(model, context=torch.no_grad)[0], plain) > 0.01
    error, count = compared(model, context=torch.no_grad)
    assert error < 1e-5 and count == 3 * 2


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_hook_on_the_norm_of_a_block_is_called(kind):
    model = BUILDERS[kind]().eval()
    for block in model.backbone.layers:
        block.norm.register_forward_hook(lambda *args: args[-1] * 2)
    error, count = compared(model, context=torch.no_grad)
    assert error < 1e-5 and count == 3 * 2


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_cache_that_records_its_past_is_left_to_transformers(kind):
    """Assisted generation crops such a cache: states that were overwritten could not be taken back."""
    model = BUILDERS[kind]().eval()

    def recording():
        cache = cache_for(model)
        for layer in next(iter(cache.values())).layers:
            layer.activate_past_recording()
        return cache

    expected, _ = generated(model, cache=recording(), context=torch.no_grad)
    install_scan()
    found, count = generated(model, cache=recording(), context=torch.no_grad)
    assert count == 0 and relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_cache_of_another_batch_is_an_error(kind):
    install_scan()
    model = BUILDERS[kind]().eval()
    cache = cache_for(model)
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.long), **cache)
        with pytest.raises((ValueError, RuntimeError), match="the cache holds states|Sizes of tensors must match"):
            model(torch.ones(3, 1, dtype=torch.long), **cache)


@pytest.mark.parametrize("kind", BUILDERS)
def test_an_input_of_another_width_is_an_error(kind):
    """A kernel without checks would read past the end of a tensor."""
    install_scan()
    model = BUILDERS[kind]().eval()
    cache, mixer = cache_for(model), model.backbone.layers[0].mixer
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.long), **cache)
        for width in (8, 200):
            with pytest.raises(RuntimeError, match="the sizes of the layer do not fit together"):
                mixer(torch.randn(2, 1, width), cache_params=next(iter(cache.values())))


@pytest.mark.parametrize("owner", [MambaMixer, MambaBlock, Mamba2Mixer, Mamba2Block, BalancedMixer])
def test_installing_replaces_a_method_and_uninstalling_restores_it(owner):
    before = owner.forward
    install_scan()
    assert owner.forward is not before and owner.forward.__wrapped__ is before
    uninstall_scan()
    assert owner.forward is before


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_compiled_model_takes_the_operators_whole(kind):
    model = BUILDERS[kind]().eval()
    expected, _ = generated(model, context=torch.no_grad)
    install_scan()
    cache, ids = cache_for(model), torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        model(ids[:, :5], **cache)
        logits = [compiled(ids[:, t : t + 1], **cache).logits for t in range(5, 8)]
    assert relative_error(torch.cat(logits, 1), expected) < 1e-5
