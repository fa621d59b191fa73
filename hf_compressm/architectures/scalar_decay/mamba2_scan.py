"""The functions of Mamba-2 and the hybrids that have its mixer run the scans of this package."""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.zamba2 import modeling_zamba2

from ...kernels.cpp_scalar_decay import mixer_step as cpp_mixer_step
from ...kernels.cpp_scalar_decay import step as cpp_step
from ...kernels.dispatch import FOREIGN, SCALAR_DECAY, scan_name
from ...kernels.scalar_decay_scan import scalar_decay_scan
from ...kernels.torch_scan import torch_transforms
from ..convolutions import convolution, convolution_step
from ..mixer_step import fit_the_kernel, stand_in_for_block, stand_in_for_mixer
from ..replaced_functions import (
    StandIn,
    check_cached_state,
    fused_block,
    is_packed,
    kernel_or_reference,
    original_function,
    serving_scan,
)
from .balanced import BalancedMixer

MODULES = {  # by model type
    "mamba2": modeling_mamba2,
    "bamba": modeling_bamba,
    "falcon_h1": modeling_falcon_h1,
    "granitemoehybrid": modeling_granitemoehybrid,
    "nemotron_h": modeling_nemotron_h,
    "zamba2": modeling_zamba2,
}
SCAN = "mamba2_chunk_scan"
OWN = SCALAR_DECAY  # of `kernels.dispatch`
NO_LIMIT = (0.0, float("inf"))


def _chunk_scan(module: ModuleType, name: str) -> Callable:
    """Return what stands in for `mamba2_chunk_scan`, with its signature; chunks have a size of our own."""

    def scan(
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        dt_bias=None,
        initial_states=None,
        dt_softplus=False,
        dt_limit=NO_LIMIT,
        return_final_states=False,
        **options,
    ):
        inputs = hidden_states, dt, A, B, C
        if is_packed(options) or serving_scan(module, name, hidden_states.device.type, OWN) in FOREIGN:
            options |= {"chunk_size": chunk_size, "D": D, "dt_bias": dt_bias, "initial_states": initial_states}
            options |= {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "return_final_states": return_final_states}
            return original_function(module, name)(*inputs, **options)
        return scalar_decay_scan(*inputs, D, dt_bias, dt_softplus, dt_limit, initial_states, return_final_states)

    return scan


def _state_update(module: ModuleType, name: str) -> Callable:
    """Return what stands in for `mamba2_selective_state_update`, a step of generation, and has its signature."""
    others = kernel_or_reference(module, name)

    def update(state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **options):
        check_cached_state(state, (*hidden_states.shape, B.shape[-1]), "batch, heads, channels of a head, N")
        by_kernel = scan_name(state.device.type, state.dtype, own=OWN) == "cpp" and state.is_contiguous()
        by_kernel = by_kernel and all(map(_is_expanded, (dt, A, D, dt_bias), (2, 1, 1, 1)))
        if by_kernel and not torch.is_grad_enabled() and not torch_transforms():
            dt, D, dt_bias = (None if each is None else each[..., 0] for each in (dt, D, dt_bias))
            y = cpp_step(state, hidden_states, dt, A[:, 0, 0], B, C, D, dt_bias, dt_softplus)
            return y if z is None else (y * F.silu(z)).to(y.dtype)
        bias = {"dt_bias": dt_bias, "dt_softplus": dt_softplus}
        return others(state, hidden_states, dt, A, B, C, D=D, z=z, **bias, **options)

    return update


def _is_expanded(tensor: Tensor | None, axes: int) -> bool:
    """Return whether a tensor has one value for all that lies behind its first axes, as one for each head has."""
    behind = [] if tensor is None else zip(tensor.shape[axes:], tensor.stride()[axes:], strict=True)
    return all(size == 1 or stride == 0 for size, stride in behind)


STAND_INS: dict[str, StandIn] = {  # by the name of what they stand in for
    SCAN: _chunk_scan,
    "mamba2_split_conv1d_scan_combined": fused_block,
    "mamba2_selective_state_update": _state_update,
    "causal_conv1d_fn": convolution,
    "causal_conv1d_update": convolution_step,
}


def _step(mixer, hidden_states, states, norm):
    """Return the output of a layer for one token, or None where its weights or the states do not fit the kernel."""
    if isinstance(mixer, modeling_falcon_h1.FalconH1Mixer):  # balanced; it has multipliers of its own
        return None
    projected = isinstance(mixer, BalancedMixer) and mixer.reduced_state_size is not None
    projections = (mixer.B_proj, mixer.C_proj) if projected else (None, None)
    layers = [(layer.weight, layer.bias) for layer in (mixer.in_proj, mixer.conv1d, mixer.out_proj)]
    vectors, gated_norm = (mixer.dt_bias, mixer.A_log, mixer.D), mixer.norm
    batch, (channels, _, width) = len(hidden_states), mixer.conv1d.weight.shape
    size = mixer.reduced_state_size if projected else mixer.ssm_state_size
    shapes = (batch, channels, width), (batch, mixer.num_heads, mixer.head_dim, size)
    tensors = vectors, projections, (gated_norm.weight, norm[0]), states, *layers
    if tuple(state.shape for state in states) != shapes or not fit_the_kernel(*tensors):
        return None
    in_proj, conv1d, out_proj = layers
    gate = gated_norm.weight, gated_norm.variance_epsilon, gated_norm.group_size
    middle = *vectors, mixer.n_groups, projections, gate
    return cpp_mixer_step(hidden_states, *states, norm, in_proj, conv1d, *middle, out_proj)


MIXERS = (  # those that have Mamba-2's `forward`
    modeling_mamba2.Mamba2Mixer,
    modeling_bamba.BambaMixer,
    modeling_granitemoehybrid.GraniteMoeHybridMambaLayer,
    modeling_nemotron_h.NemotronHMamba2Mixer,
    modeling_zamba2.Zamba2MambaMixer,
    BalancedMixer,
)
STEPS: dict[type, StandIn] = {  # for the `forward` of these
    **dict.fromkeys(MIXERS, stand_in_for_mixer(_step)),
    modeling_mamba2.Mamba2Block: stand_in_for_block,
}
