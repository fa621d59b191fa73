"""The functions of Mamba-1 and its kin run the scans of this package, and let an observer see a scan's arguments."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.mamba import modeling_mamba
from transformers.models.zamba import modeling_zamba

from ...kernels.cpp_scan import mixer_step as cpp_mixer_step
from ...kernels.cpp_scan import step as cpp_step
from ...kernels.dispatch import FOREIGN, NAMES, scan_name
from ...kernels.scan import selective_scan
from ...kernels.torch_scan import torch_transforms
from ..convolutions import convolution, convolution_step
from ..mixer_step import fit_the_kernel, stand_in_for_block, stand_in_for_mixer
from ..replaced_functions import (
    StandIn,
    check_cached_state,
    fused_block,
    kernel_or_reference,
    original_function,
    serving_scan,
)
from .family import Observer

MODULES = {  # by model type
    "mamba": modeling_mamba,
    "falcon_mamba": modeling_falcon_mamba,
    "jamba": modeling_jamba,
    "zamba": modeling_zamba,
}
SCAN = "mamba_selective_scan"
OWN = NAMES  # of `kernels.dispatch`

_observer: Observer | None = None


@contextmanager
def observer_of_scans(observer: Observer) -> Iterator[None]:
    """Let the observer run every scan of a stand-in within this block, and so see what each is given."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def _scan(module: ModuleType, name: str) -> Callable:
    """Return what stands in for `mamba_selective_scan`, with its signature."""

    def scan(
        u, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **options
    ):
        if _observer is not None:
            y, last_state = _observer(u, dt, A, B, C, D, z, delta_bias, delta_softplus)
            return (y, last_state) if return_last_state else y
        if serving_scan(module, name, u.device.type) in FOREIGN:
            original = original_function(module, name)
            return original(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **options)
        return selective_scan(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state)

    return scan


def _state_update(module: ModuleType, name: str) -> Callable:
    """Return what stands in for `mamba_selective_state_update`, a step of generation, and has its signature."""
    others = kernel_or_reference(module, name)

    def update(state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **options):
        check_cached_state(state, (*hidden_states.shape, A.shape[-1]), "batch, channels, N")
        by_kernel = scan_name(state.device.type, state.dtype) == "cpp" and state.is_contiguous()
        if by_kernel and not torch.is_grad_enabled() and not torch_transforms():
            return cpp_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
        bias = {"dt_bias": dt_bias, "dt_softplus": dt_softplus}
        return others(state, hidden_states, dt, A, B, C, D=D, z=z, **bias, **options)

    return update


STAND_INS: dict[str, StandIn] = {  # by the name of what they stand in for
    SCAN: _scan,
    "mamba_inner_fn": fused_block,
    "mamba_selective_state_update": _state_update,
    "causal_conv1d_fn": convolution,
    "causal_conv1d_update": convolution_step,
}


def _step(mixer, hidden_states, states, norm):
    """Return the output of a layer for one token, or None where its weights or the states do not fit the kernel."""
    conv1d, x_proj, vectors = mixer.conv1d, mixer.x_proj.weight, (mixer.A_log, mixer.D)
    layers = [(layer.weight, layer.bias) for layer in (mixer.in_proj, conv1d, mixer.dt_proj, mixer.out_proj)]
    channels, _, width = conv1d.weight.shape
    shapes = (len(hidden_states), channels, width), (len(hidden_states), *vectors[0].shape)
    if tuple(state.shape for state in states) != shapes or not fit_the_kernel(
        (x_proj, norm[0]), vectors, states, *layers
    ):
        return None
    in_proj, conv1d, dt_proj, out_proj = layers
    return cpp_mixer_step(hidden_states, *states, norm, in_proj, conv1d, x_proj, dt_proj, *vectors, out_proj)


STEPS: dict[type, StandIn] = {  # for the `forward` of these
    modeling_mamba.MambaMixer: stand_in_for_mixer(_step),
    modeling_mamba.MambaBlock: stand_in_for_block,
}
