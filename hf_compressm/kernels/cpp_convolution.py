"""The compiled kernel, the folder `cpp`, computes the causal convolution before a scan on a CPU; see `cpp_scan`."""

import torch
from torch import Tensor

from .contract import ONCE

WIDTHS = (2, 3, 4)  # positions that the kernel takes in: those that the CUDA kernels of causal-conv1d take in


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    """Convolve every channel with its own weights over the last positions; the result can be differentiated once.

    It is computed in float32 and rounded once.

    Args:
        x: (batch, D, L), in float32, bfloat16 or float16.
        weight: (D, K), the newest position last; K is one of `WIDTHS`.
        bias: (D,).
        silu: True applies silu to the result.

    Returns:
        y, (batch, D, L), in the dtype of x, which lies in memory as (batch, L, D).

    Raises:
        RuntimeError: K is none of `WIDTHS`.
    """
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    return _convolution(x.transpose(1, 2), weight, bias, silu).transpose(1, 2)


def causal_convolution_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Take in one position, (batch, D): overwrite the last K, (batch, D, K), and return y, (batch, D).

    All are float32 and contiguous; there are no gradients.
    """
    return torch.ops.hf_compressm_kernel.causal_convolution_step(state, x, weight, bias, silu)


@torch.library.custom_op("hf_compressm::causal_convolution", mutates_args=())
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return torch.ops.hf_compressm_kernel.convolution_forward(x, weight, bias, silu)


@torch.library.custom_op("hf_compressm::causal_convolution_backward", mutates_args=())
def _convolution_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.hf_compressm_kernel.convolution_backward(grad_y, x, weight, bias, silu)


@_convolution.register_fake
def _(x, weight, bias, silu):
    return x.new_empty(x.shape)


@_convolution_backward.register_fake
def _(grad_y, x, weight, bias, silu):
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(len(weight))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_y):
    x, weight, bias = ctx.saved_tensors  # checkpointing gives them once
    of_x, of_weight, of_bias = _convolution_backward(grad_y, x, weight, bias, ctx.silu)
    return of_x, of_weight, None if bias is None else of_bias, None


def _refuse_second_derivatives(ctx, *_):
    raise RuntimeError(ONCE)


_convolution.register_autograd(_differentiate, setup_context=_setup_context)
_convolution_backward.register_autograd(_refuse_second_derivatives)
