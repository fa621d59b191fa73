"""The selective scan is computed here by the implementation that `dispatch` chooses."""

import torch
from torch import Tensor

from .dispatch import choose_scan
from .operators import CHUNK
from .torch_scan import effective_time_step


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
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the selective scan of Mamba (Gu & Dao, arXiv 2312.00752, algorithm 2), differentiable once.

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
        softplus: whether to apply softplus to the biased time step.
        initial_state: h_0, (batch, D, N); zero if not given.
        return_last_state: whether to return h_L, too.
        implementation: "torch", "cpp" or "triton"; by default what `dispatch` chooses for the device.

    Returns:
        y, (batch, D, L), in the dtype of u; with `return_last_state` also h_L, (batch, D, N), in the states' dtype.

    Raises:
        ValueError: shapes do not fit together, or the implementation cannot compute here.
    """
    tensors = (u, time_step, A, B, C, D, gate, time_step_bias, initial_state)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    y, last_state, *_ = _scan(*tensors, softplus, keep, implementation)
    return (y, last_state) if return_last_state else y


def sampled_scan(
    u: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    time_step_bias: Tensor | None = None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Scan without gradients, and sample what passes at the end of every chunk, one position in sixteen.

    Returns:
        y and h_L, as of `selective_scan`; the positions, (P,); and at these u, time_step (effective) and gate, (batch,
        D, P), B and C, (batch, N, P), the states, (batch, P, N, D), and A: all in the states' dtype but the gate.
    """
    y, last_state, _, kept = _scan(u, time_step, A, B, C, D, gate, time_step_bias, None, softplus, True, None)
    ends = CHUNK * torch.arange(1, kept.shape[1] + 1, device=u.device) - 1
    positions = ends.clamp(max=u.shape[2] - 1)
    dtype = last_state.dtype
    u, time_step, B, C = (tensor[..., positions].to(dtype) for tensor in (u, time_step, B, C))
    sample = {
        "u": u,
        "time_step": effective_time_step(time_step, time_step_bias, softplus),
        "A": A.to(dtype),
        "B": B,
        "C": C,
        "gate": None if gate is None else gate[..., positions],
        "states": torch.cat([kept[:, 1:], last_state.mT.unsqueeze(1)], 1),
    }
    return y, last_state, positions, sample


def _scan(u, time_step, A, B, C, D, gate, time_step_bias, initial_state, softplus, keep, implementation):
    """Check the shapes, choose the operator and return what it does: y, last_state, ungated, kept."""
    _check_shapes(u, time_step, A, B, C, D, gate, time_step_bias, initial_state)
    dtype = state_dtype(u, time_step, A, B, C)
    scan = choose_scan(u.device.type, dtype, implementation)
    A, D, time_step_bias, initial_state = (
        None if tensor is None else tensor.to(dtype).contiguous() for tensor in (A, D, time_step_bias, initial_state)
    )
    return scan(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep)


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of the tensors has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


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
