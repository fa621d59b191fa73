"""States of a scan with scalar decay, as Mamba-2 has it, are sampled here at the end of every chunk of positions."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .operators import CHUNK


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
