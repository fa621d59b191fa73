"""This file states what an implementation of the scan with scalar decay has to offer.

The contract, as `Contract` says it, with chunks of `CHUNK` positions:

    forward(x, time_step, A, B, C, D, initial_state, keep) → y, last_state, kept
    backward(grad_y, grad_last_state, x, time_step, A, B, C, D, kept)
        → the gradients for x, time_step, A, B, C, D and initial_state

Shapes are those of `scalar_decay_scan`, none empty; the time step is the effective one. All but x, B and C have one
dtype, in which everything is computed, y included. D and the initial state may be None. With `keep` the forward pass
saves the states at the start of every chunk, (batch, chunks, G, N, heads / G · p). What is returned is contiguous.
"""

import torch
from torch import Tensor

from .contract import Contract

CHUNK = 64  # positions that the matrix form takes at a time


def last_shape(x: Tensor, B: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of a state: (batch, heads, p, N)."""
    return x.shape[0], x.shape[2], x.shape[3], B.shape[3]


def kept_shape(x: Tensor, B: Tensor) -> tuple[int, int, int, int, int]:
    """Return the shape of the states at the start of every chunk: (batch, chunks, G, N, heads / G · p)."""
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    return batch, (length + CHUNK - 1) // CHUNK, groups, states, heads * head_dim // groups


def _empty_outputs(x, time_step, A, B, C, D, initial_state, keep):
    return A.new_empty(x.shape), A.new_empty(last_shape(x, B)), A.new_empty(kept_shape(x, B) if keep else 0)


define_scalar_decay_scan = Contract(
    scan="scalar_decay_scan",
    inputs="Tensor x, Tensor time_step, Tensor A, Tensor B, Tensor C, Tensor? D",
    kept="Tensor kept",
    empty_outputs=_empty_outputs,
    memory_format=torch.contiguous_format,
).define
