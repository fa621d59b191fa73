"""A step of generation runs a whole layer as one operator, where nothing else has a part in what the layer computes.

Between its small operations a layer spends most of such a step in Python. Stand-ins for the `forward` of mixers, and
of the blocks of Mamba and Mamba-2 that hold a norm and a mixer, take the operator for a single token on a CPU, in
float32, and leave everything else to the methods that they stand in for.
"""

import functools
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from ..kernels.dispatch import compiled_kernel_serves
from ..kernels.torch_scan import torch_transforms
from .convolutions import ACTIVATIONS
from .replaced_functions import StandIn, is_packed

PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.activations")  # where plain modules come from
TENSORS = (nn.Parameter, Tensor)  # no subclass: it may be sharded, or quantised

Norm = tuple[Tensor | None, float]  # weight and ε
WITHOUT_NORM: Norm = (None, 0.0)
Step = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor], Norm], Tensor | None]


def stand_in_for_mixer(step: Step) -> StandIn:
    """Return the stand-in for a mixer's `forward`, from its `step`.

    Args:
        step: a function of the mixer, its input (batch, 1, hidden size), the states in the cache, that of the
            convolution first, and the norm of the block, if the input is that of a block; it returns the output, or
            None where the operator cannot serve.
    """

    def stand_in(mixer_class: type, name: str) -> Callable:
        whole = getattr(mixer_class, name)

        @functools.wraps(whole)
        def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
            output = _output_of_step(step, self, hidden_states, cache_params, attention_mask, kwargs)
            return whole(self, hidden_states, cache_params, attention_mask, **kwargs) if output is None else output

        forward.step = step
        return forward

    return stand_in


def stand_in_for_block(block_class: type, name: str) -> Callable:
    """Return the stand-in for the `forward` of a block that adds what its mixer makes of its norm."""
    whole = getattr(block_class, name)

    @functools.wraps(whole)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        output, mixer, norm = None, self.mixer, self.norm
        step = getattr(type(mixer).forward, "step", None)
        if step and not _is_hooked(mixer) and _is_plain(norm):
            given = hidden_states, cache_params, attention_mask, kwargs
            output = _output_of_step(step, mixer, *given, (norm.weight, norm.variance_epsilon))
        return whole(self, hidden_states, cache_params, attention_mask, **kwargs) if output is None else output

    return forward


def fit_the_kernel(*groups: tuple[Tensor | None, ...]) -> bool:
    """Return whether all of these are what the operators read: plain parameters or tensors, float32 and contiguous."""
    for tensor in chain.from_iterable(groups):
        if tensor is not None and (
            type(tensor) not in TENSORS or tensor.dtype is not torch.float32 or not tensor.is_contiguous()
        ):
            return False
    return True


def _output_of_step(
    step: Step,
    mixer: nn.Module,
    hidden_states: Tensor,
    cache,
    mask: Tensor | None,
    options: dict,
    norm: Norm = WITHOUT_NORM,
) -> Tensor | None:
    """Return the output of the operator, or None where this is no step of generation, or it cannot serve."""
    is_step = cache is not None and hidden_states.shape[1] == 1 and mask is None
    if not is_step or not _kernel_serves(mixer, hidden_states, options):
        return None
    states = _cached_states(cache, mixer.layer_idx)
    return states and step(mixer, hidden_states.contiguous(), states, norm)


def _kernel_serves(mixer: nn.Module, hidden_states: Tensor, options: dict) -> bool:
    if torch.is_grad_enabled() or torch_transforms() or torch.is_autocast_enabled("cpu") or is_packed(options):
        return False
    if hidden_states.device.type != "cpu" or hidden_states.dtype is not torch.float32:
        return False
    if not ACTIVATIONS.get(mixer.activation) or not compiled_kernel_serves("cpu"):
        return False
    return all(map(_is_plain, mixer.children()))


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module computes what its class does, and no hook waits for its call."""
    return type(module).__module__.startswith(PLAIN) and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _cached_states(cache, layer: int) -> tuple[Tensor, Tensor] | None:
    """Return the states that a step overwrites, or None where there are none, or old ones have to be kept."""
    states = cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0)
    return None if cache.is_recording_past(layer) or states[0] is None or states[1] is None else states
