"""Plain PyTorch computes the selective scan, on any device and in any dtype, with a backward pass of its own.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t        y_t = Σ_n C_t[n] h_t[:, n]

Autograd through the step-by-step loop keeps every state and every factor, (batch, L, D, N) several times over, and
its backward pass costs O(L²). Here the forward pass keeps one state in `CHUNK`, the backward pass recomputes those
between two of them: linear time, and few enough states at a time to stay in a cache. On a CPU torch takes powers of
two several times faster than those of e, and multiplies a row by a matrix several times faster than a matrix by a
column.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .operators import CHUNK, define_scan, kept_shape, last_shape, position_major

LOG2_E = 1.4426950408889634


def forward(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep) -> tuple[Tensor, ...]:
    """Implement the contract in `operators`."""
    u_, time_step, B, C = (tensor.to(A.dtype) for tensor in (u, time_step, B, C))
    time_step = effective_time_step(time_step, time_step_bias, softplus)
    step, drive, B, C = map(_time_major, (time_step, time_step * u_, B, C))  # (L, batch, …)
    h = A.new_zeros(last_shape(u, A)) if initial_state is None else initial_state.clone()
    decay, output, kept = torch.empty_like(h), torch.empty_like(drive), A.new_empty(kept_shape(u, A) if keep else 0)
    rate = LOG2_E * A
    for t in range(len(step)):
        if keep and t % CHUNK == 0:
            kept[:, t // CHUNK] = h.mT
        torch.mul(step[t].unsqueeze(-1), rate, out=decay).exp2_()
        h.mul_(decay).baddbmm_(drive[t].unsqueeze(-1), B[t].unsqueeze(1))
        torch.bmm(C[t].unsqueeze(1), h.mT, out=output[t].unsqueeze(1))
    ungated = position_major(u, A.dtype).copy_(output.permute(1, 2, 0))
    if D is not None:
        ungated += u_ * D[:, None]
    y = position_major(u).copy_(ungated if gate is None else ungated * F.silu(gate.to(A.dtype)))
    ungated = ungated if keep and gate is not None else A.new_empty(0)
    return y, h, ungated, kept


def backward(
    grad_y, grad_last_state, u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept
) -> tuple[Tensor, ...]:
    """Implement the contract in `operators`."""
    grad, u_, raw, B_, C_ = (tensor.to(A.dtype) for tensor in (grad_y, u, time_step, B, C))
    of_D, of_gate, of_bias = (A.new_empty(0) for _ in range(3))
    if gate is not None:
        gate_ = gate.to(A.dtype)
        of_gate = _like(gate, torch.ops.aten.silu_backward(grad * ungated, gate_))
        grad = grad * F.silu(gate_)
    step = effective_time_step(raw, time_step_bias, softplus)
    inputs = map(_time_major, (step, step * u_, B_, C_, grad))
    of_step, of_drive, of_B, of_C, of_A, of_state = _recurrence_gradients(*inputs, A, kept, grad_last_state.clone())
    of_step, of_drive, of_B, of_C = (gradient.permute(1, 2, 0) for gradient in (of_step, of_drive, of_B, of_C))
    of_u, of_step = of_drive * step, of_step + of_drive * u_
    if D is not None:
        of_u, of_D = of_u + grad * D[:, None], (grad * u_).sum((0, 2))
    if softplus:
        of_step = of_step * torch.sigmoid(effective_time_step(raw, time_step_bias, softplus=False))
    if time_step_bias is not None:
        of_bias = of_step.sum((0, 2))
    of_u, of_step, of_B, of_C = map(_like, (u, time_step, B, C), (of_u, of_step, of_B, of_C))
    return of_u, of_step, of_A, of_B, of_C, of_D, of_gate, of_bias, of_state


def _recurrence_gradients(step, drive, B, C, grad_y, A, kept, grad_h) -> tuple[Tensor, ...]:
    """Return gradients for Δ (in the exponent alone), Δ u, B, C, all (L, batch, …), A (D, N) and h_0 (batch, D, N).

    Chunks are taken from the last to the first: each has its states computed again, then its gradients, backwards in
    time.
    """
    grad_step, grad_drive, grad_B, grad_C = map(torch.empty_like, (step, drive, B, C))
    decay, h = drive.new_empty(CHUNK, *grad_h.shape), drive.new_empty(CHUNK + 1, *grad_h.shape)
    rate, grad_A = LOG2_E * A, torch.zeros_like(grad_h)  # of each sequence

    for start in reversed(range(0, len(step), CHUNK)):
        positions = range(start, min(start + CHUNK, len(step)))
        h[0] = kept[:, start // CHUNK].mT
        for i, t in enumerate(positions):
            torch.mul(step[t].unsqueeze(-1), rate, out=decay[i]).exp2_()
            torch.mul(h[i], decay[i], out=h[i + 1]).baddbmm_(drive[t].unsqueeze(-1), B[t].unsqueeze(1))
        for i, t in reversed(list(enumerate(positions))):
            grad_h.baddbmm_(grad_y[t].unsqueeze(-1), C[t].unsqueeze(1))
            torch.bmm(grad_y[t].unsqueeze(1), h[i + 1], out=grad_C[t].unsqueeze(1))
            torch.bmm(drive[t].unsqueeze(1), grad_h, out=grad_B[t].unsqueeze(1))
            torch.bmm(B[t].unsqueeze(1), grad_h.mT, out=grad_drive[t].unsqueeze(1))
            grad_h.mul_(decay[i])
            grad_exponent = torch.mul(grad_h, h[i], out=decay[i])  # ∂loss/∂(Δ_t A)
            grad_A.addcmul_(grad_exponent, step[t].unsqueeze(-1))
            torch.sum(grad_exponent.mul_(A), -1, out=grad_step[t])
    return grad_step, grad_drive, grad_B, grad_C, grad_A.sum(0), grad_h


def torch_transforms() -> bool:
    """Return whether torch differentiates in forward mode here, or a transform of `torch.func` is at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def plain_scan(u, time_step, A, B, C, D, gate, time_step_bias, initial_state, softplus) -> tuple[Tensor, Tensor]:
    """Return y and h_L from operations that torch can differentiate in any mode, any number of times, and vectorise.

    An operator cannot be: of forward-mode derivatives, say, torch would take zero in silence. Autograd keeps every
    state of this loop.
    """
    with torch.autocast(u.device.type, enabled=False):
        u_, time_step, B, C = (tensor.to(A.dtype) for tensor in (u, time_step, B, C))
        time_step = effective_time_step(time_step, time_step_bias, softplus)
        h = A.new_zeros(last_shape(u, A)) if initial_state is None else initial_state
        outputs = []
        for step, drive, b, c in zip(*(x.unbind(-1) for x in (time_step, time_step * u_, B, C)), strict=True):
            h = torch.exp(step.unsqueeze(-1) * A) * h + drive.unsqueeze(-1) * b.unsqueeze(1)
            outputs.append((h @ c.unsqueeze(-1)).squeeze(-1))
        y = torch.stack(outputs, -1) if outputs else u_
        if D is not None:
            y = y + u_ * D[:, None]
        if gate is not None:
            y = y * F.silu(gate.to(A.dtype))
    return y.to(u.dtype), h


def effective_time_step(time_step: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Return Δ, (batch, D, L), in the dtype of `time_step`, after its bias (D,) and softplus."""
    if bias is not None:
        time_step = time_step + bias.to(time_step.dtype)[:, None]
    return F.softplus(time_step) if softplus else time_step


def _time_major(tensor: Tensor) -> Tensor:
    """Return (batch, X, L) as (L, batch, X), contiguous, so that a position is one block of memory."""
    return tensor.permute(2, 0, 1).contiguous()


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return the values in the dtype and the memory order of the tensor."""
    return torch.empty_like(tensor).copy_(values)


scan = define_scan("torch", forward, backward)
