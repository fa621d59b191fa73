"""The scan with scalar decay, as Mamba-2 has it, in PyTorch: its output, and samples of its states.

    H_t = exp(Δ_t A) H_{t-1} + Δ_t x_t B_tᵀ,     y_t = H_t C_t

with one decay for each head, and B and C for each group of heads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .operators import CHUNK

POSITIONS = 64  # that the matrix form takes at a time


def sampled_states(
    x: Tensor, time_step: Tensor, A: Tensor, B: Tensor, chunk: int = CHUNK
) -> Iterator[tuple[int, Tensor]]:
    """Yield the states H_t = exp(Δ_t A) H_{t-1} + Δ_t x_t B_tᵀ at the last position of every chunk.

    No more than the states of one position are held at a time. They are float32, or float64 if an input is.

    Args:
        x: (batch, L, heads, p).
        time_step: effective Δ, (batch, L, heads).
        A: decay rates, negative, (heads,).
        B: input map, (batch, L, G, N); head h is of group h // (heads / G).
        chunk: positions between two samples.

    Yields:
        The position, and the states there, (batch, G, heads / G · p, N): rows of H of all heads of each group.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), torch.float32)
    x, time_step, A, B = (tensor.to(dtype) for tensor in (x, time_step, A, B))
    groups = B.shape[2]
    state = B.new_zeros(len(x), groups, x.shape[2] // groups * x.shape[3], B.shape[3])
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], chunk):
            part = slice(start, start + chunk)
            decay = (time_step[:, part] * A).cumsum(1)  # log of what is left since the start, (batch, l, heads)
            to_end = (decay[:, -1:] - decay).exp() * time_step[:, part]
            drive = (x[:, part] * to_end.unsqueeze(-1)).unflatten(2, (groups, -1)).flatten(3)
            whole = decay[:, -1].exp().unflatten(1, (groups, -1)).repeat_interleave(x.shape[3], 2)
            state = state * whole.unsqueeze(-1) + torch.einsum("blgk,blgn->bgkn", drive, B[:, part])
            yield min(part.stop, x.shape[1]) - 1, state


def scalar_decay_scan(x: Tensor, time_step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Compute the scan in its matrix form, chunk by chunk (arXiv 2405.21060, section 6); autograd differentiates it.

    Scores C_l · B_s are made once for each group, not for each head.

    Args:
        x: (batch, L, heads, p).
        time_step: effective Δ, (batch, L, heads).
        A: decay rates, negative, (heads,).
        B, C: (batch, L, G, N).

    Returns:
        y without a skip connection, (batch, L, heads, p), in the widest dtype of the inputs.
    """
    groups, outputs = B.shape[2], []
    x, time_step = x.unflatten(2, (groups, -1)), time_step.unflatten(2, (groups, -1))  # heads by group
    rates, state = A.unflatten(0, (groups, -1)), 0.0
    for start in range(0, x.shape[1], POSITIONS):
        part = slice(start, start + POSITIONS)
        log = (time_step[:, part] * rates).cumsum(1)  # of what is left of the state before the chunk, (b, l, g, h)
        drive, B_part, C_part = x[:, part] * time_step[:, part].unsqueeze(-1), B[:, part], C[:, part]
        between = (log.unsqueeze(2) - log.unsqueeze(1)).permute(0, 3, 4, 1, 2)  # (b, g, h, l, s)
        causal = torch.ones(between.shape[-2:], dtype=torch.bool, device=x.device).tril()
        decay = between.masked_fill(~causal, -torch.inf).exp()
        scores = torch.einsum("blgn,bsgn->bgls", C_part, B_part)
        y = torch.einsum("bghls,bsghp->blghp", scores.unsqueeze(2) * decay, drive)
        if start:
            y = y + torch.einsum("blgn,bghpn->blghp", C_part, state) * log.exp().unsqueeze(-1)
            state = state * log[:, -1].exp()[..., None, None]
        to_end = drive * (log[:, -1:] - log).exp().unsqueeze(-1)
        state = state + torch.einsum("bsghp,bsgn->bghpn", to_end, B_part)
        outputs.append(y)
    return torch.cat(outputs, 1).flatten(2, 3)
