"""The scan with scalar decay, as Mamba-2 has it, runs by whichever implementation serves best; its states are sampled.

    H_t = exp(Δ_t A) H_{t-1} + Δ_t x_t B_tᵀ,     y_t = H_t C_t

with one decay for each head, and B and C for each group of heads.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_shapes, states_dtype
from .dispatch import choose_scalar_decay_scan
from .operators import CHUNK
from .torch_scalar_decay import forward as plain_scan
from .torch_scan import torch_transforms


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


def scalar_decay_scan(
    x: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    time_step_bias: Tensor | None = None,
    softplus: bool = False,
    time_step_limit: tuple[float, float] | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the scan of Mamba-2 (Dao & Gu, arXiv 2405.21060), differentiable once.

    Everything is computed in float32 (float64 if any input is) whatever the inputs are, inside autocast too. In
    forward-mode differentiation and in the transforms of `torch.func` plain operations serve, which have every
    derivative.

    Args:
        x: input, (batch, L, heads, p).
        time_step: Δ, (batch, L, heads), before the bias, the softplus and the limits where those are given.
        A: decay rates, negative, (heads,).
        B: input map, (batch, L, G, N); head h is of group h // (heads / G).
        C: output map, (batch, L, G, N).
        D: skip connection, (heads,).
        time_step_bias: (heads,).
        softplus: True applies softplus to the biased time step.
        time_step_limit: the least and the largest effective time step, if there are such.
        initial_state: H_0, (batch, heads, p, N); zero if not given.
        return_last_state: True returns H_L, too.
        implementation: "torch", "cpp" or "triton"; by default what `dispatch` chooses for the device.

    Returns:
        y, (batch, L, heads, p); with `return_last_state` also H_L, (batch, heads, p, N): both float32 or float64.

    Raises:
        ValueError: the shapes do not fit together, a dtype is none of the four of floating point, or the
            implementation cannot serve here.
    """
    tensors = {"x": x, "time_step": time_step, "A": A, "B": B, "C": C, "D": D}
    tensors |= {"time_step_bias": time_step_bias, "initial_state": initial_state}
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and B {tuple(B.shape)}, expected (batch, L, heads, p), (batch, L, G, N)."
        )
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"x has {heads} heads and B {groups} groups of them; allowed: a number that divides {heads}.")
    maps, of_heads = (batch, length, groups, states), (heads,)
    expected = {"time_step": (batch, length, heads), "A": of_heads, "B": maps, "C": maps, "D": of_heads}
    expected |= {"time_step_bias": of_heads, "initial_state": (batch, heads, head_dim, states)}
    check_shapes(tensors, expected, "x")
    dtype = states_dtype(tensors)
    with torch.autocast(x.device.type, enabled=False):
        time_step, A, D, initial_state = (
            None if tensor is None else tensor.to(dtype).contiguous() for tensor in (time_step, A, D, initial_state)
        )
        time_step = effective_time_step(time_step, time_step_bias, softplus, time_step_limit)
    inputs = x, time_step, A, B, C, D, initial_state
    if 0 in (*x.shape, states):  # nothing passes through a state
        y = x.to(dtype) * (0 if D is None else D.unsqueeze(-1))
        zeros = A.new_zeros(batch, heads, head_dim, states)
        last_state = zeros if initial_state is None else zeros + initial_state
    elif torch_transforms():
        y, last_state, _ = plain_scan(*inputs, keep=False)
    else:
        keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
        y, last_state, _ = choose_scalar_decay_scan(x.device.type, dtype, implementation)(*inputs, keep)
    return (y, last_state) if return_last_state else y


def effective_time_step(
    time_step: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float] | None
) -> Tensor:
    """Return Δ, (batch, L, heads), in the dtype of `time_step`, after its bias (heads,), softplus and limits."""
    time_step = time_step if bias is None else time_step + bias.to(time_step.dtype)
    time_step = F.softplus(time_step) if softplus else time_step
    return time_step if limit is None else time_step.clamp(*limit)
