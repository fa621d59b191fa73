"""Plain PyTorch computes the scan with scalar decay, on any device and in any dtype, with a backward pass of its own.

Within a chunk of positions the scan is a product with a matrix (arXiv 2405.21060, section 6),

    y_l = Σ_{s ≤ l} (C_l · B_s) exp(Σ_{s < t ≤ l} Δ_t A) Δ_s x_s  +  exp(Σ_{t ≤ l} Δ_t A) H C_l,

H being the state before the chunk. The scores C_l · B_s are made once for each group of heads. Autograd would keep the
matrices of all chunks; here the forward pass keeps one state for each chunk, and the backward pass makes them again.
Sums of Δ A are taken in float64 and no step of them goes below `VANISHED`: a small difference of two large ones keeps
its digits.

Every group of a sequence is a sequence of its own here, a row: x is (rows, L, heads, p), B and C are (rows, L, N),
a state is (rows, N, heads · p).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .scalar_decay_operators import CHUNK, define_scalar_decay_scan, last_shape

VANISHED = -1000.0  # its power of e is zero even in float64


class Decays(NamedTuple):
    """Decays are what is left of a state after some steps of a chunk of l positions.

    Attributes:
        within: from the position of the column to that of the row, (rows, heads, l, l), zero above the diagonal.
        from_start: from before the chunk to each position, (rows, l, heads).
        to_end: from each position to the last one, (rows, l, heads).
    """

    within: Tensor
    from_start: Tensor
    to_end: Tensor

    def whole(self, head_dim: int) -> Tensor:
        """Return what is left of each channel of a state after all steps, (rows, 1, heads · p)."""
        return self.from_start[:, -1].repeat_interleave(head_dim, -1).unsqueeze(1)


def forward(x, time_step, A, B, C, D, initial_state, keep) -> tuple[Tensor, Tensor, Tensor]:
    """Implement the contract in `scalar_decay_operators`, by operations that torch can differentiate in any mode."""
    groups, head_dim = B.shape[2], x.shape[3]
    x_rows, step = (_rows(tensor.to(A.dtype), groups) for tensor in (x, time_step))
    B_rows, C_rows = (_rows(tensor.to(A.dtype), groups).squeeze(2) for tensor in (B, C))
    rate = _rates(A, x, groups)
    state = A.new_zeros(last_shape(x, B)) if initial_state is None else initial_state
    state = state.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1).mT
    outputs, kept = [], []
    for start in range(0, x.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        kept.append(state)
        decays, drive = _decays(step[:, part] * rate), x_rows[:, part] * step[:, part].unsqueeze(-1)
        scores = torch.bmm(C_rows[:, part], B_rows[:, part].mT).unsqueeze(1)
        before = torch.bmm(C_rows[:, part], state).view(drive.shape) * decays.from_start.unsqueeze(-1)
        outputs.append(before + ((scores * decays.within) @ drive.transpose(1, 2)).transpose(1, 2))
        remaining = (drive * decays.to_end.unsqueeze(-1)).flatten(2)
        state = torch.baddbmm(state * decays.whole(head_dim), B_rows[:, part].mT, remaining)
    y = _from_rows(torch.cat(outputs, 1), x)
    y = y if D is None else y + x.to(A.dtype) * D.unsqueeze(-1)
    last_state = state.mT.reshape(last_shape(x, B)).clone(memory_format=torch.contiguous_format)
    if not keep:
        return y, last_state, A.new_empty(0)
    return y, last_state, torch.stack([each.unflatten(0, (len(x), groups)) for each in kept], 1)


def backward(grad_y, grad_last_state, x, time_step, A, B, C, D, kept) -> tuple[Tensor, ...]:
    """Implement the contract in `scalar_decay_operators`: chunk by chunk, from the last to the first."""
    groups, head_dim = B.shape[2], x.shape[3]
    x_rows, step, grad_rows = (_rows(tensor.to(A.dtype), groups) for tensor in (x, time_step, grad_y))
    B_rows, C_rows = (_rows(tensor.to(A.dtype), groups).squeeze(2) for tensor in (B, C))
    rate, of_rate = _rates(A, x, groups), 0
    of_x, of_step, of_B, of_C = map(torch.empty_like, (x_rows, step, B_rows, C_rows))
    of_state = grad_last_state.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1).mT
    states = kept.transpose(1, 2).flatten(0, 1)
    for chunk in reversed(range(kept.shape[1])):
        part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        step_, B_, C_, state = step[:, part], B_rows[:, part], C_rows[:, part], states[:, chunk]
        decays, drive, grad = _decays(step_ * rate), x_rows[:, part] * step_.unsqueeze(-1), grad_rows[:, part]

        # through the state before the chunk, and the one after it
        from_start, to_end = decays.from_start.unsqueeze(-1), decays.to_end.unsqueeze(-1)
        grad_before, remaining = (grad * from_start).flatten(2), (drive * to_end).flatten(2)
        of_drive = torch.bmm(B_, of_state).view(drive.shape) * to_end
        of_from_start = (torch.bmm(C_, state) * grad_before).view(drive.shape).sum(-1)
        of_to_end = (of_drive * drive).sum(-1)
        whole = decays.whole(head_dim)
        of_whole = (of_state * state * whole).sum(1).unflatten(-1, (-1, head_dim)).sum(-1)
        of_B_, of_C_ = torch.bmm(remaining, of_state.mT), torch.bmm(grad_before, state.mT)
        of_state = torch.baddbmm(of_state * whole, C_.mT, grad_before)

        # within the chunk
        scores, drive_, grad_ = torch.bmm(C_, B_.mT).unsqueeze(1), drive.transpose(1, 2), grad.transpose(1, 2)
        of_scores = (grad_ @ drive_.mT).mul_(decays.within)
        of_drive += ((scores * decays.within).mT @ grad_).transpose(1, 2)
        of_within = of_scores * scores
        of_scores = of_scores.sum(1)
        of_B[:, part], of_C[:, part] = of_B_.baddbmm_(of_scores.mT, C_), of_C_.baddbmm_(of_scores, B_)

        # log decay t is a part of all decays that lead over it: from s < t to l ≥ t
        of_log = _sums_over(of_within) + of_from_start.flip(1).cumsum(1).flip(1) + of_whole.unsqueeze(1)
        of_log += of_to_end.cumsum(1) - of_to_end
        of_step[:, part] = of_log * rate + (of_drive * x_rows[:, part]).sum(-1)
        of_rate = of_rate + (of_log * step_).sum(1)
        of_x[:, part] = of_drive * step_.unsqueeze(-1)

    of_A = of_rate.view(len(x), -1).sum(0)
    of_x, of_step, of_B, of_C = map(_from_rows, (of_x, of_step, of_B, of_C), (x, time_step, B, C))
    of_D = None
    if D is not None:
        of_x = of_x + grad_y * D.unsqueeze(-1)
        of_D = (grad_y * x.to(A.dtype)).sum((0, 1, 3))
    initial_state = of_state.mT.reshape(last_shape(x, B)).clone(memory_format=torch.contiguous_format)
    return of_x.to(x.dtype), of_step, of_A, of_B.to(B.dtype), of_C.to(C.dtype), of_D, initial_state


def _decays(log: Tensor) -> Decays:
    """Return the decays of a chunk from Δ A of its steps, (rows, l, heads)."""
    wide = log.dtype if log.device.type == "mps" else torch.float64  # that device has no float64
    sums = log.to(wide).clamp(min=VANISHED).cumsum(1)
    within = (sums.mT.unsqueeze(-1) - sums.mT.unsqueeze(-2)).to(log.dtype)
    above = torch.ones(within.shape[-2:], dtype=torch.bool, device=log.device).triu(1)
    within = within.masked_fill(above, -torch.inf).exp()
    return Decays(within, sums.to(log.dtype).exp(), within[..., -1, :].mT)


def _sums_over(gradients: Tensor) -> Tensor:
    """Return, for each position t of a chunk, the sum over all rows from t on and all columns before t.

    Args:
        gradients: (rows, heads, l, l).

    Returns:
        (rows, l, heads).
    """
    lower = torch.ones_like(gradients[0, 0]).tril()
    return ((lower.mT @ gradients) * (lower - lower.diag().diag())).sum(-1).mT


def _rates(A: Tensor, x: Tensor, groups: int) -> Tensor:
    """Return A, (heads,), as (rows, 1, heads of a group)."""
    return A.view(groups, -1).repeat(len(x), 1).unsqueeze(1)


def _rows(tensor: Tensor, groups: int) -> Tensor:
    """Return (batch, L, heads or G, …) as (rows, L, heads of a group or 1, …)."""
    return tensor.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows in the shape and the order of what they were made of."""
    return rows.unflatten(0, (len(like), -1)).transpose(1, 2).reshape(like.shape).contiguous()


scan = define_scalar_decay_scan("torch", forward, backward)
