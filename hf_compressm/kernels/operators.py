"""This module makes operators of torch from selective scans, and states what an implementation has to offer.

An implementation is two functions on tensors, `forward` and `backward`. Since they are operators, torch.compile and
torch.export take them whole. The contract, with chunks of `CHUNK` positions:

    forward(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep)
        → y, last_state, ungated, kept
    backward(grad_y, grad_last_state, u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept)
        → the gradients for u, time_step, A, B, C, D, gate, time_step_bias and initial_state

Shapes are those of `selective_scan`. A, D, the bias and the states have one dtype, in which everything is computed;
the others may be narrower. D, gate, bias and initial state may be None; their gradients may then be anything. With
`keep` the forward pass saves what its backward pass needs, and what statistics are made of: y before its gate, and
the states at the start of every chunk, (batch, chunks, N, D). y lies in memory as (batch, L, D), as the projection
after it reads it; a gradient lies as what it is for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ONCE = (
    "The scan of hf_compressm can be differentiated once. For second derivatives call hf_compressm.uninstall_scan(), "
    "or use torch.func, whose transforms take a plain loop in its place."
)
CHUNK = 16  # positions between two states that the backward pass finds saved

Scan = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def define_scan(name: str, forward: Scan, backward: Callable) -> Scan:
    """Define the operator `hf_compressm::<name>_scan`, differentiable once: a gradient of its gradient raises."""

    @torch.library.custom_op(f"hf_compressm::{name}_scan", mutates_args=())
    def scan(
        u: Tensor,
        time_step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        gate: Tensor | None,
        time_step_bias: Tensor | None,
        softplus: bool,
        initial_state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            return forward(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep)

    @torch.library.custom_op(f"hf_compressm::{name}_scan_backward", mutates_args=())
    def scan_backward(
        grad_y: Tensor,
        grad_last_state: Tensor,
        u: Tensor,
        time_step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        gate: Tensor | None,
        time_step_bias: Tensor | None,
        softplus: bool,
        ungated: Tensor,
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            *gradients, of_state = backward(
                grad_y, grad_last_state, u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept
            )
        inputs = u, time_step, A, B, C, D, gate, time_step_bias
        absent = A.new_empty(0)
        given = (absent.clone() if value is None else g for value, g in zip(inputs, gradients, strict=True))
        return *given, of_state

    @scan.register_fake
    def _(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep):
        ungated = position_major(u, A.dtype) if keep and gate is not None else A.new_empty(0)
        return position_major(u), A.new_empty(last_shape(u, A)), ungated, A.new_empty(kept_shape(u, A) if keep else 0)

    @scan_backward.register_fake
    def _(grad_y, grad_last_state, u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept):
        optional = [
            A.new_empty(0) if value is None else torch.empty_like(value) for value in (D, gate, time_step_bias)
        ]
        return (
            *(torch.empty_like(value) for value in (u, time_step, A, B, C)),
            *optional,
            A.new_empty(last_shape(u, A)),
        )

    def setup_context(ctx, inputs, output):
        *tensors, softplus, initial_state, _ = inputs
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.softplus, ctx.has_initial_state = softplus, initial_state is not None
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_y, grad_last_state, *_):
        *tensors, ungated, kept = ctx.saved_tensors
        u, A = tensors[0], tensors[2]
        grad_y = torch.zeros_like(u) if grad_y is None else grad_y
        grad_last_state = A.new_zeros(last_shape(u, A)) if grad_last_state is None else grad_last_state
        *gradients, of_state = scan_backward(grad_y, grad_last_state, *tensors, ctx.softplus, ungated, kept)
        given = [None if value is None else gradient for gradient, value in zip(gradients, tensors, strict=True)]
        return *given, None, of_state if ctx.has_initial_state else None, None

    def refuse_second_derivatives(ctx, *_):
        raise RuntimeError(ONCE)

    scan.register_autograd(differentiate, setup_context=setup_context)
    scan_backward.register_autograd(refuse_second_derivatives)
    return scan


def position_major(u: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty (batch, D, L) that lies in memory as (batch, L, D)."""
    batch, channels, length = u.shape
    return u.new_empty(batch, length, channels, dtype=dtype).transpose(1, 2)


def last_shape(u: Tensor, A: Tensor) -> tuple[int, int, int]:
    """Return the shape of a state: (batch, D, N)."""
    return (u.shape[0], *A.shape)


def kept_shape(u: Tensor, A: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of the states at the start of every chunk: (batch, chunks, N, D)."""
    batch, channels, length = u.shape
    return batch, (length + CHUNK - 1) // CHUNK, A.shape[1], channels
