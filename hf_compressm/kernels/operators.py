"""This file states what an implementation of the selective scan has to offer.

The contract, as `Contract` says it, with chunks of `CHUNK` positions:

    forward(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep)
        → y, last_state, ungated, kept
    backward(grad_y, grad_last_state, u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept)
        → the gradients for u, time_step, A, B, C, D, gate, time_step_bias and initial_state

Shapes are those of `selective_scan`. A, D, the bias and the states have one dtype, in which everything is computed;
the others may be narrower. D, gate, bias and initial state may be None. With `keep` the forward pass saves what its
backward pass needs, and what statistics are made of: y before its gate, and the states at the start of every chunk,
(batch, chunks, N, D). y lies in memory as (batch, L, D), as the projection after it reads it; a gradient lies as what
it is for.
"""

import torch
from torch import Tensor

from .contract import Contract

CHUNK = 16  # positions between two states that the backward pass finds saved


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


def _empty_outputs(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep):
    ungated = position_major(u, A.dtype) if keep and gate is not None else A.new_empty(0)
    return position_major(u), A.new_empty(last_shape(u, A)), ungated, A.new_empty(kept_shape(u, A) if keep else 0)


define_scan = Contract(
    scan="scan",
    inputs="Tensor u, Tensor time_step, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? gate, Tensor? time_step_bias, bool softplus",
    kept="Tensor ungated, Tensor kept",
    empty_outputs=_empty_outputs,
    memory_format=torch.preserve_format,
).define
