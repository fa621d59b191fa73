"""This module makes operators of torch from scans with scalar decay, and states what an implementation has to offer.

As in `operators`, an implementation is two functions on tensors. The contract, with chunks of `CHUNK` positions:

    forward(x, time_step, A, B, C, D, initial_state, keep) → y, last_state, kept
    backward(grad_y, grad_last_state, x, time_step, A, B, C, D, kept)
        → the gradients for x, time_step, A, B, C, D and initial_state

Shapes are those of `scalar_decay_scan`, none empty; the time step is the effective one. All but x, B and C have one
dtype, in which everything is computed, y included. D and the initial state may be None; the gradient for such a D may
be anything. With `keep` the forward pass saves the states at the start of every chunk, (batch, chunks, G, N, heads / G
· p). What is returned is contiguous.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .operators import ONCE

CHUNK = 64  # positions that the matrix form takes at a time

ScalarDecayScan = Callable[..., tuple[Tensor, Tensor, Tensor]]


def define_scalar_decay_scan(name: str, forward: ScalarDecayScan, backward: Callable) -> ScalarDecayScan:
    """Define the operator `hf_compressm::<name>_scalar_decay_scan`, differentiable once, as `define_scan` does."""

    @torch.library.custom_op(f"hf_compressm::{name}_scalar_decay_scan", mutates_args=())
    def scan(
        x: Tensor,
        time_step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x, time_step, A, B, C, D, initial_state, keep)

    @torch.library.custom_op(f"hf_compressm::{name}_scalar_decay_scan_backward", mutates_args=())
    def scan_backward(
        grad_y: Tensor,
        grad_last_state: Tensor,
        x: Tensor,
        time_step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            *gradients, of_D, of_state = backward(grad_y, grad_last_state, x, time_step, A, B, C, D, kept)
        return *gradients, A.new_empty(0) if D is None else of_D, of_state

    @scan.register_fake
    def _(x, time_step, A, B, C, D, initial_state, keep):
        return A.new_empty(x.shape), A.new_empty(last_shape(x, B)), A.new_empty(kept_shape(x, B) if keep else 0)

    @scan_backward.register_fake
    def _(grad_y, grad_last_state, x, time_step, A, B, C, D, kept):
        gradients = (
            torch.empty_like(value, memory_format=torch.contiguous_format) for value in (x, time_step, A, B, C)
        )
        return *gradients, A.new_empty(0) if D is None else torch.empty_like(D), A.new_empty(last_shape(x, B))

    def setup_context(ctx, inputs, output):
        *tensors, initial_state, _ = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.has_initial_state = initial_state is not None
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_y, grad_last_state, *_):
        *tensors, kept = ctx.saved_tensors
        x, _, A, B, _, D = tensors
        grad_y = A.new_zeros(x.shape) if grad_y is None else grad_y
        grad_last_state = A.new_zeros(last_shape(x, B)) if grad_last_state is None else grad_last_state
        *gradients, of_D, of_state = scan_backward(grad_y, grad_last_state, *tensors, kept)
        return *gradients, None if D is None else of_D, of_state if ctx.has_initial_state else None, None

    def refuse_second_derivatives(ctx, *_):
        raise RuntimeError(ONCE)

    scan.register_autograd(differentiate, setup_context=setup_context)
    scan_backward.register_autograd(refuse_second_derivatives)
    return scan


def last_shape(x: Tensor, B: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of a state: (batch, heads, p, N)."""
    return x.shape[0], x.shape[2], x.shape[3], B.shape[3]


def kept_shape(x: Tensor, B: Tensor) -> tuple[int, int, int, int, int]:
    """Return the shape of the states at the start of every chunk: (batch, chunks, G, N, heads / G · p)."""
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    return batch, (length + CHUNK - 1) // CHUNK, groups, states, heads * head_dim // groups
