"""The recurrence h_t = λ h_{t-1} + v_t runs in parallel over chunks of the sequence, with its own backward pass.

The sequence is cut into about √L chunks of about √L steps. All chunks are run at once from a zero state, their last
states are carried from chunk to chunk, and each carry, decayed by λ, λ², …, is added to its chunk: 2 √L short
steps in place of L, and no memory but the states.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_recurrence(eigenvalues: Tensor, inputs: Tensor) -> Tensor:
    """Compute the states h_t = λ h_{t-1} + v_t from h_0 = 0, with derivatives of every order and in every mode.

    Args:
        eigenvalues: λ, complex, (N,).
        inputs: v, complex, (batch, L, N).

    Returns:
        h_1 … h_L, (batch, L, N).
    """
    return _LinearRecurrence.apply(eigenvalues, inputs)


class _LinearRecurrence(torch.autograd.Function):
    """The derivatives of a linear recurrence are linear recurrences, so that they have derivatives themselves."""

    @staticmethod
    def forward(eigenvalues: Tensor, inputs: Tensor) -> Tensor:
        return _run(eigenvalues, inputs)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        eigenvalues, _ = inputs
        ctx.save_for_backward(eigenvalues, output)
        ctx.save_for_forward(eigenvalues, output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Run the adjoint backwards in time, g_t = ∂_t + λ̄ g_{t+1}, and return ∂λ = Σ_t h̄_{t-1} g_t and ∂v = g."""
        eigenvalues, states = ctx.saved_tensors
        adjoint = linear_recurrence(eigenvalues.conj().resolve_conj(), grad.flip(1)).flip(1)
        return torch.einsum("bln,bln->n", states[:, :-1].conj(), adjoint[:, 1:]), adjoint

    @staticmethod
    def jvp(ctx, eigenvalues_tangent: Tensor, inputs_tangent: Tensor) -> Tensor:
        """Run the recurrence of the tangents, ḣ_t = λ ḣ_{t-1} + λ̇ h_{t-1} + v̇_t."""
        eigenvalues, states = ctx.saved_tensors
        before = F.pad(states[:, :-1], (0, 0, 1, 0))
        return linear_recurrence(eigenvalues, inputs_tangent + eigenvalues_tangent * before)

    @staticmethod
    def vmap(info, in_dims, eigenvalues: Tensor, inputs: Tensor) -> tuple[Tensor, int]:
        """Run all instances as one recurrence with more states, since states do not act on each other."""
        eigenvalues, inputs = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip((eigenvalues, inputs), in_dims, strict=True)
        )
        states = linear_recurrence(eigenvalues.flatten(), inputs.movedim(0, 2).flatten(2))
        return states.unflatten(2, (info.batch_size, -1)), 2


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
