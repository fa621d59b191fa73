"""The recurrence h_t = λ h_{t-1} + v_t runs in parallel over chunks of the sequence, with its own backward pass.

The sequence is cut into about √L chunks of about √L steps. All chunks are run at once from a zero state, their last
states are carried from chunk to chunk, and each carry, decayed by λ, λ², …, is added to its chunk: 2 √L short
steps in place of L, and no memory but the states.
"""

import math

import torch
from torch import Tensor


def linear_recurrence(eigenvalues: Tensor, inputs: Tensor) -> Tensor:
    """Compute the states h_t = λ h_{t-1} + v_t from h_0 = 0; the result can be differentiated once.

    Args:
        eigenvalues: λ, complex, (N,).
        inputs: v, complex, (batch, L, N).

    Returns:
        h_1 … h_L, (batch, L, N).
    """
    return _LinearRecurrence.apply(eigenvalues, inputs)


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eigenvalues: Tensor, inputs: Tensor) -> Tensor:
        states = _run(eigenvalues, inputs)
        ctx.save_for_backward(eigenvalues, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Run the adjoint backwards in time, g_t = ∂_t + λ̄ g_{t+1}, and return ∂λ = Σ_t h̄_{t-1} g_t and ∂v = g."""
        eigenvalues, states = ctx.saved_tensors
        adjoint = _run(eigenvalues.conj().resolve_conj(), grad.flip(1)).flip(1)
        return torch.einsum("bln,bln->n", states[:, :-1].conj(), adjoint[:, 1:]), adjoint


def _run(eigenvalues: Tensor, inputs: Tensor) -> Tensor:
    batch, length, state_size = inputs.shape
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)
    h = inputs.new_zeros(batch, chunks * steps, state_size)
    h[:, :length] = inputs
    h = h.view(batch, chunks, steps, state_size)
    for t in range(1, steps):
        h[:, :, t].addcmul_(h[:, :, t - 1], eigenvalues)
    powers = eigenvalues ** torch.arange(1, steps + 1, device=h.device).unsqueeze(1)  # (steps, N)
    carry = h[:, 0, -1]
    for k in range(1, chunks):
        h[:, k].addcmul_(carry.unsqueeze(1), powers)
        carry = h[:, k, -1]
    return h.view(batch, chunks * steps, state_size)[:, :length]
