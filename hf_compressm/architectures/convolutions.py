"""The convolutions before the scans of Transformers' models run the kernel of this package where it serves."""

from collections.abc import Callable
from types import ModuleType

import torch

from ..kernels.cpp_convolution import WIDTHS, causal_convolution, causal_convolution_step
from ..kernels.dispatch import compiled_kernel_serves
from ..kernels.torch_scan import torch_transforms
from .replaced_functions import is_packed, kernel_or_reference

ACTIVATIONS = {None: False, "silu": True, "swish": True}  # name → whether it is silu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def convolution(module: ModuleType, name: str) -> Callable:
    """Return what stands in for `causal_conv1d_fn`, with its signature."""
    others = kernel_or_reference(module, name)

    def convolve(hidden_states, weight, bias=None, activation=None, **options):
        serves = hidden_states.dtype in DTYPES and weight.dtype in DTYPES and not is_packed(options)
        if serves and _kernel_serves(hidden_states, weight, activation):
            return causal_convolution(hidden_states, weight, bias, ACTIVATIONS[activation])
        return others(hidden_states, weight, bias, activation=activation, **options)

    return convolve


def convolution_step(module: ModuleType, name: str) -> Callable:
    """Return what stands in for `causal_conv1d_update`, a step of generation, and has its signature."""
    others = kernel_or_reference(module, name)

    def update(hidden_states, conv_state, weight, bias=None, activation=None):
        tensors = hidden_states, conv_state, weight, *([] if bias is None else [bias])
        serves = all(tensor.dtype == torch.float32 for tensor in tensors) and not torch.is_grad_enabled()
        fits = conv_state.is_contiguous() and conv_state.shape == (*hidden_states.shape[:2], weight.shape[1])
        if serves and fits and hidden_states.shape[2] == 1 and _kernel_serves(hidden_states, weight, activation):
            x, weight = hidden_states[..., 0].contiguous(), weight.contiguous()
            return causal_convolution_step(conv_state, x, weight, bias, ACTIVATIONS[activation]).unsqueeze(-1)
        return others(hidden_states, conv_state, weight, bias, activation=activation)

    return update


def _kernel_serves(x: torch.Tensor, weight: torch.Tensor, activation: str | None) -> bool:
    fits = activation in ACTIVATIONS and weight.shape[1] in WIDTHS and not torch_transforms()
    return fits and compiled_kernel_serves(x.device.type)
