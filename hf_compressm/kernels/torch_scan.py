"""The selective scan in plain PyTorch, on any device, with a backward pass of its own.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t        y_t = Σ_n C_t[n] h_t[:, n]

Autograd through the step-by-step loop keeps every state and every factor, (batch, L, D, N) several times over, and
its backward pass costs O(L²). Here the forward pass keeps one state in T, the backward pass recomputes the T - 1
between two of them: O(L/T + T) states, linear time. T ≈ √L.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_CHUNK = 8


@torch.compiler.disable
def selective_scan(
    u: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    time_step_bias: Tensor | None = None,
    softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of Mamba (Gu & Dao, arXiv 2312.00752, algorithm 2), differentiable once.

    States are float32 (float64 if any input is) whatever the inputs are, inside autocast too.

    Args:
        u: input, (batch, D, L).
        time_step: Δ, (batch, D, L), before the bias and the softplus where those are given.
        A: decay rates, negative, (D, N).
        B: input map, (batch, N, L).
        C: output map, (batch, N, L).
        D: skip connection, (D,).
        gate: z, (batch, D, L); the output is multiplied by silu(z).
        time_step_bias: (D,).
        softplus: apply softplus to the biased time step.
        initial_state: h_0, (batch, D, N); zero if not given.
        return_last_state: also return h_L.

    Returns:
        y, (batch, D, L), in the dtype of u; with `return_last_state` also h_L, (batch, D, N), in the states' dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check_shapes(u, time_step, A, B, C, D, gate, time_step_bias, initial_state)
    with torch.autocast(u.device.type, enabled=False):
        dtype = state_dtype(u, time_step, A, B, C)
        u_, A, B, C = (tensor.to(dtype) for tensor in (u, A, B, C))
        step = effective_time_step(time_step.to(dtype), time_step_bias, softplus)
        if initial_state is None:
            initial_state = u_.new_zeros(u.shape[0], *A.shape)
        y, last_state = _SelectiveScan.apply(u_, step, A, B, C, initial_state.to(dtype))
        if D is not None:
            y = y + u_ * D.to(dtype)[:, None]
        if gate is not None:
            y = y * F.silu(gate.to(dtype))
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def effective_time_step(time_step: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ, (batch, D, L), in the dtype of `time_step`, after its bias (D,) and softplus."""
    if bias is not None:
        time_step = time_step + bias.to(time_step.dtype)[:, None]
    return F.softplus(time_step) if softplus else time_step


def states(u: Tensor, time_step: Tensor, A: Tensor, B: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The states themselves, a chunk of the sequence at a time and without gradients; shapes as in `selective_scan`.

    Yields:
        (positions, decay, h): a slice of the L positions, 1 - exp(Δ A) without cancellation and h, both
        (positions, batch, D, N). The caller may overwrite both; the next chunk reuses them.
    """
    batch, channels, length = u.shape
    step, drive, B = _time_major(time_step), _time_major(time_step * u), _time_major(B)
    h = u.new_zeros(batch, channels, A.shape[1])
    chunk = min(chunk, length)
    decay_buffer, state_buffer = (u.new_empty(chunk, *h.shape) for _ in range(2))
    for start in range(0, length, chunk):
        positions = slice(start, min(start + chunk, length))
        for i, t in enumerate(range(positions.start, positions.stop)):
            decay = torch.mul(step[t].unsqueeze(-1), A, out=decay_buffer[i]).expm1_().neg_()
            h = torch.addcmul(h, decay, h, value=-1, out=state_buffer[i])
            h.baddbmm_(drive[t].unsqueeze(-1), B[t].unsqueeze(1))
        count = positions.stop - positions.start
        h = h.clone()
        yield positions, decay_buffer[:count], state_buffer[:count]


class _SelectiveScan(torch.autograd.Function):
    """u, Δ (batch, D, L), A (D, N), B, C (batch, N, L), h_0 (batch, D, N) → y (batch, D, L), h_L (batch, D, N)."""

    @staticmethod
    def forward(ctx, u, time_step, A, B, C, initial_state):
        length = u.shape[2]
        chunk = max(MIN_CHUNK, math.isqrt(length))
        step, drive, B, C = map(_time_major, (time_step, time_step * u, B, C))  # (L, batch, …)
        h, decay = initial_state.clone(), torch.empty_like(initial_state)
        y = torch.empty_like(drive)
        saved = [] if any(ctx.needs_input_grad) else None
        for t in range(length):
            if saved is not None and t % chunk == 0:
                saved.append(h.clone())
            torch.mul(step[t].unsqueeze(-1), A, out=decay).exp_()
            h.mul_(decay).baddbmm_(drive[t].unsqueeze(-1), B[t].unsqueeze(1))
            torch.bmm(h, C[t].unsqueeze(-1), out=y[t].unsqueeze(-1))
        if saved is not None:
            ctx.save_for_backward(u, time_step, step, drive, A, B, C, *saved)
            ctx.chunk = chunk
        return y.permute(1, 2, 0), h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last_state):
        u, time_step, step, drive, A, B, C, *saved = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            grads = _recurrence_gradients(step, drive, A, B, C, saved, ctx.chunk, _time_major(grad_y), grad_last_state)
        grad_step, grad_drive, grad_B, grad_C = (grad.permute(1, 2, 0) for grad in grads[:4])
        grad_A, grad_initial_state = grads[4:]
        return grad_drive * time_step, grad_step + grad_drive * u, grad_A, grad_B, grad_C, grad_initial_state


def _recurrence_gradients(step, drive, A, B, C, saved, chunk, grad_y, grad_last_state) -> tuple[Tensor, ...]:
    """Gradients for Δ (in the exponent alone), Δ u, B and C, all (L, batch, …), for A (D, N) and h_0 (batch, D, N).

    From the last chunk to the first: its states again, then its gradients backwards in time.
    """
    grad_h = grad_last_state.clone()  # ∂loss/∂h_t, (batch, D, N)
    grad_step, grad_drive = torch.empty_like(step), torch.empty_like(drive)
    grad_A, grad_B, grad_C = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
    decay, h = drive.new_empty(chunk, *grad_h.shape), drive.new_empty(chunk + 1, *grad_h.shape)

    for start, first_state in reversed(list(zip(range(0, len(step), chunk), saved, strict=True))):
        positions = range(start, min(start + chunk, len(step)))
        h[0] = first_state
        for i, t in enumerate(positions):
            torch.mul(step[t].unsqueeze(-1), A, out=decay[i]).exp_()
            torch.mul(h[i], decay[i], out=h[i + 1]).baddbmm_(drive[t].unsqueeze(-1), B[t].unsqueeze(1))
        for i, t in reversed(list(enumerate(positions))):
            grad_h.baddbmm_(grad_y[t].unsqueeze(-1), C[t].unsqueeze(1))
            torch.bmm(grad_y[t].unsqueeze(1), h[i + 1], out=grad_C[t].unsqueeze(1))
            torch.bmm(drive[t].unsqueeze(1), grad_h, out=grad_B[t].unsqueeze(1))
            torch.bmm(grad_h, B[t].unsqueeze(-1), out=grad_drive[t].unsqueeze(-1))
            grad_h.mul_(decay[i])
            grad_exponent = torch.mul(grad_h, h[i], out=decay[i])  # ∂loss/∂(Δ_t A)
            grad_step[t] = torch.einsum("bdn,dn->bd", grad_exponent, A)
            grad_A += torch.einsum("bdn,bd->dn", grad_exponent, step[t])
    return grad_step, grad_drive, grad_B, grad_C, grad_A, grad_h


def _time_major(tensor: Tensor) -> Tensor:
    """(batch, X, L) → (L, batch, X), contiguous, so that a position is one block of memory."""
    return tensor.permute(2, 0, 1).contiguous()


def _check_shapes(u, time_step, A, B, C, D, gate, time_step_bias, initial_state) -> None:
    if u.ndim != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (batch, D, L).")
    batch, channels, length = u.shape
    state_size = A.shape[-1]
    expected = {
        "time_step": (time_step, (batch, channels, length)),
        "A": (A, (channels, state_size)),
        "B": (B, (batch, state_size, length)),
        "C": (C, (batch, state_size, length)),
        "D": (D, (channels,)),
        "gate": (gate, (batch, channels, length)),
        "time_step_bias": (time_step_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for u of shape {tuple(u.shape)}."
            )
