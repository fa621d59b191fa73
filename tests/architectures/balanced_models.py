"""Small models of the six families with Mamba-2's mixer, their balanced ones, and the scan as it is defined."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import scalar_decay_models
import torch
from conftest import STATE_SIZE, from_origin
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel, set_seed

from hf_compressm.architectures.scalar_decay.balanced import BALANCED_CLASSES, BalancedMixer, balance_modules

N, GROUPS = STATE_SIZE, 2
SIZES = {"vocab_size": 64, "eos_token_id": None}
STRONG = {"initializer_range": 0.2}  # as large as in trained models: with the default 0.02 the states hardly matter
MULTIPLIERS = {"ssm_in_multiplier": 1.3, "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 0.7]}
NO_CLAMP = {"time_step_min": 1e-6, "time_step_max": 10.0}  # the chunk scan clamps Δ, the one-step update does not
# Case → what its config says beside that of the small model of its family.
CASES = {
    "mamba2": {},
    "bamba": {},
    "falcon_h1": {**MULTIPLIERS, "mamba_rms_norm": False},
    "falcon_h1_norm": {**MULTIPLIERS, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    "granitemoehybrid": {"num_experts_per_tok": 2},
    "nemotron_h": {**NO_CLAMP, "num_experts_per_tok": 2},
    "zamba2": NO_CLAMP,
}


def config_of(case: str, **changes) -> PreTrainedConfig:
    given = SIZES | STRONG | CASES[case] | changes
    return scalar_decay_models.config_of(case.removesuffix("_norm"), **given)


def new(case: str, **changes) -> PreTrainedModel:
    """A model of Transformers with the weights that its initialiser gives, in evaluation mode."""
    set_seed(0)
    return AutoModelForCausalLM.from_config(config_of(case, **changes)).eval()


@torch.no_grad()
def build(case: str, **changes) -> PreTrainedModel:
    """A model of Transformers in which no bias and no other vector is at a neutral value of the initialiser."""
    model = new(case, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


@from_origin
def build_stock(seed: int = 0, *, case: str, **changes) -> PreTrainedModel:
    """A model of Transformers that was saved and loaded, as users have theirs."""
    return build(case, **changes)


def balanced(model: PreTrainedModel) -> PreTrainedModel:
    """A balanced copy that projects nothing yet."""
    model = copy.deepcopy(model)
    balance_modules(model)
    return model


def mixers_of(model: PreTrainedModel) -> list:
    """Mixers with a state, balanced or not, in their order."""
    plain = tuple(kind for kind, own in BALANCED_CLASSES.items() if issubclass(own, BalancedMixer))
    return [module for module in model.modules() if isinstance(module, plain)]


@torch.no_grad()
def cut(model: PreTrainedModel, sizes: list[int | None], seed: int = 0) -> PreTrainedModel:
    """Project the states of each layer that has one, at random; a second cut composes with the first."""
    generator = torch.Generator().manual_seed(seed)
    for mixer, size in zip(mixers_of(model), sizes, strict=True):
        if size is None:
            continue
        for name in ("B_proj", "C_proj"):
            old = getattr(mixer, name)
            factor = torch.randn(GROUPS, size, old.shape[1], generator=generator) / old.shape[1] ** 0.5
            setattr(mixer, name, torch.nn.Parameter(factor.to(old) @ old))
        mixer.reduced_state_size = size
    model.config.balanced_state_size = list(sizes)
    return model


def build_cut(case: str, sizes: list[int | None] | int = 3, **changes) -> PreTrainedModel:
    """A balanced model in evaluation mode whose layers project their states."""
    model = balanced(build_stock(case=case, **changes))
    count = len(mixers_of(model))
    return cut(model, sizes if isinstance(sizes, list) else [sizes] * count).eval()


def module_of(mixer):
    """The module of Transformers in which the mixer's functions lie."""
    kind = next(kind for kind in type(mixer).__mro__ if kind.__module__.startswith("transformers."))
    return inspect.getmodule(kind)


def exact_scan(x, dt, A, B, C, D, state, dt_bias, dt_limit=(0.0, float("inf"))):
    """y (batch, L, heads, p) and the last state, step by step; Transformers' own scan computes in float32."""
    dt, heads = F.softplus(dt + dt_bias).clamp(*dt_limit), x.shape[2]
    B, C = (each.repeat_interleave(heads // each.shape[2], 2) for each in (B, C))
    state = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


@contextmanager
def exact_scans(model: PreTrainedModel, read: Callable | None = None) -> Iterator[None]:
    """Replace the scans in the module of a model, as a user might; `read(layer, C)` replaces C before each scan.

    Args:
        read: is given the index of the layer among those with a state, and C, (batch, L, G, states).
    """
    mixers, running = mixers_of(model), []
    module = module_of(mixers[0])
    handles = [
        mixer.register_forward_pre_hook(lambda *_, index=index: running.append(index))
        for index, mixer in enumerate(mixers)
    ]

    def chunk_scan(x, dt, A, B, C, *, D, dt_bias, initial_states, return_final_states, dt_limit, **_):
        C = C if read is None else read(running[-1], C)
        y, state = exact_scan(x, dt, A, B, C, D, initial_states, dt_bias, dt_limit)
        return (y, state) if return_final_states else y

    def state_update(state, x, dt, A, B, C, D, *, dt_bias, z=None, **_):
        C = C if read is None else read(running[-1], C[:, None])[:, 0]
        inputs = x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], D[:, 0]
        y, new = exact_scan(*inputs, state, dt_bias[:, 0])
        state.copy_(new)
        return y[:, 0] if z is None else y[:, 0] * F.silu(z)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "mamba2_chunk_scan", chunk_scan)
            patch.setattr(module, "mamba2_selective_state_update", state_update)
            yield
    finally:
        for handle in handles:
            handle.remove()


def cache_for(model: PreTrainedModel) -> dict[str, DynamicCache]:
    """An empty cache, under the name that the model's `forward` has for it."""
    names = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in names else "past_key_values"
    return {name: DynamicCache(config=model.config), "use_cache": True}


def states_of(cache: dict, model: PreTrainedModel) -> list[torch.Tensor]:
    """The states in a cache, (batch, heads, p, states) for each layer that has one."""
    (layers,) = (each.layers for each in cache.values() if isinstance(each, DynamicCache))
    return [layers[mixer.layer_idx].recurrent_states[0].clone() for mixer in mixers_of(model)]


def tokens(batch: int = 2, length: int = 19, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
