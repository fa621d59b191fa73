"""A step of generation runs a whole mixer as one operator, where nothing else has a part in what the mixer computes.

Between its small operations a mixer spends most of such a step in Python. The stand-in for its `forward` takes the
operator for a single token on a CPU, in float32, and leaves everything else to the method that it stands in for.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..kernels.dispatch import scan_name
from ..kernels.torch_scan import torch_transforms
from .convolutions import ACTIVATIONS
from .replaced_functions import is_packed

PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.activations")  # where plain modules come from

Step = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor | None]


def stand_in_for_forward(step: Step) -> Callable[[type, str], Callable]:
    """Return the stand-in for a mixer's `forward`, from its `step`.

    Args:
        step: a function of the mixer, its input (batch, 1, hidden size) and the states in the cache, that of the
            convolution first; it returns the output, or None where the operator cannot serve.
    """

    def stand_in(mixer_class: type, name: str) -> Callable:
        whole = getattr(mixer_class, name)

        @functools.wraps(whole)
        def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
            output = None
            is_step = cache_params is not None and hidden_states.shape[1] == 1 and attention_mask is None
            if is_step and _kernel_serves(self, hidden_states, kwargs):
                states = _cached_states(cache_params, self.layer_idx)
                output = states and step(self, hidden_states.contiguous(), states)
            return whole(self, hidden_states, cache_params, attention_mask, **kwargs) if output is None else output

        return forward

    return stand_in


def fit_the_kernel(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether all of these are what the operators read: plain parameters or tensors, float32 and contiguous."""
    return all(
        tensor is None
        or (type(tensor) in (nn.Parameter, Tensor) and tensor.dtype == torch.float32 and tensor.is_contiguous())
        for tensor in tensors
    )


def _kernel_serves(mixer: nn.Module, hidden_states: Tensor, options: dict) -> bool:
    if torch.is_grad_enabled() or torch_transforms() or torch.is_autocast_enabled("cpu") or is_packed(options):
        return False
    if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
        return False
    if not ACTIVATIONS.get(mixer.activation) or scan_name("cpu", own=("cpp", "torch")) != "cpp":
        return False
    return all(map(_is_plain, mixer.children()))


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module computes what its class does, and no hook waits for its call."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not hooked and type(module).__module__.startswith(PLAIN)


def _cached_states(cache, layer: int) -> tuple[Tensor, Tensor] | None:
    """Return the states that a step overwrites, or None where there are none, or old ones have to be kept."""
    states = cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0)
    return None if cache.is_recording_past(layer) or any(state is None for state in states) else states
