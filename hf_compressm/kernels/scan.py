"""The selective scan runs by whichever implementation serves best."""

import torch
from torch import Tensor

from .checks import check_shapes, states_dtype
from .dispatch import choose_scan
from .operators import CHUNK
from .torch_scan import effective_time_step, plain_scan, torch_transforms


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

    The states are float32 (float64 if any input is) whatever the inputs are, inside autocast too. In forward-mode
    differentiation and in the transforms of `torch.func` a plain loop serves, which has every derivative.

    Args:
        u: input, (batch, D, L).
        time_step: Δ, (batch, D, L), before the bias and the softplus where those are given.
        A: decay rates, negative, (D, N).
        B: input map, (batch, N, L).
        C: output map, (batch, N, L).
        D: skip connection, (D,).
        gate: z, (batch, D, L); the output is multiplied by silu(z).
        time_step_bias: (D,).
        softplus: True applies softplus to the biased time step.
        initial_state: h_0, (batch, D, N); zero if not given.
        return_last_state: True returns h_L, too.
        implementation: "torch", "cpp" or "triton"; by default what `dispatch` chooses for the device.

    Returns:
        y, (batch, D, L), in the dtype of u; with `return_last_state` also h_L, (batch, D, N), in the states' dtype.

    Raises:
        ValueError: the shapes do not fit together, a dtype is none of the four of floating point, or the
            implementation cannot serve here.
    """
    tensors = (u, time_step, A, B, C, D, gate, time_step_bias, initial_state)
    if torch_transforms():
        y, last_state = plain_scan(*_checked(*tensors), softplus)
    else:
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
    """Compute the scan without gradients, and sample what passes through it at the end of every chunk of 16 positions.

    Returns:
        y and h_L as of `selective_scan`; the positions, (P,); and at these u, time_step (effective) and gate, (batch,
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
    """Return what the operator does: y, last_state, ungated, kept."""
    *tensors, initial_state = _checked(u, time_step, A, B, C, D, gate, time_step_bias, initial_state)
    scan = choose_scan(u.device.type, tensors[2].dtype, implementation)
    return scan(*tensors, softplus, initial_state, keep)


def _checked(u, time_step, A, B, C, D, gate, time_step_bias, initial_state) -> tuple[Tensor | None, ...]:
    """Return the tensors, with A, D, the bias and the initial state in the states' dtype and contiguous."""
    given = {"u": u, "time_step": time_step, "A": A, "B": B, "C": C, "D": D, "gate": gate}
    given |= {"time_step_bias": time_step_bias, "initial_state": initial_state}
    if u.ndim != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (batch, D, L).")
    batch, channels, length = u.shape
    state_size = A.shape[-1]
    expected = {
        "time_step": (batch, channels, length),
        "A": (channels, state_size),
        "B": (batch, state_size, length),
        "C": (batch, state_size, length),
        "D": (channels,),
        "gate": (batch, channels, length),
        "time_step_bias": (channels,),
        "initial_state": (batch, channels, state_size),
    }
    check_shapes(given, expected, "u")
    dtype = states_dtype(given)
    A, D, time_step_bias, initial_state = (
        None if tensor is None else tensor.to(dtype).contiguous() for tensor in (A, D, time_step_bias, initial_state)
    )
    return u, time_step, A, B, C, D, gate, time_step_bias, initial_state
