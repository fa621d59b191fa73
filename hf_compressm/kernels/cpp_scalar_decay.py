"""The compiled kernel, the folder `cpp`, computes the scan with scalar decay on a CPU; see `cpp_scan`."""

import torch

from .scalar_decay_operators import define_scalar_decay_scan


def forward(x, time_step, A, B, C, D, initial_state, keep):
    """Implement the contract in `scalar_decay_operators`."""
    return torch.ops.hf_compressm_kernel.scalar_decay_forward(x, time_step, A, B, C, D, initial_state, keep)


def backward(grad_y, grad_last_state, x, time_step, A, B, C, D, kept):
    """Implement the contract in `scalar_decay_operators`."""
    return torch.ops.hf_compressm_kernel.scalar_decay_backward(
        grad_y, grad_last_state.contiguous(), x, time_step, A, B, C, D, kept
    )


def step(state, x, time_step, A, B, C, D, time_step_bias, softplus):
    """Take a step of the recurrence: overwrite the state and return y, (batch, heads, p), without gradients.

    The state is (batch, heads, p, N), float32 and contiguous; x is (batch, heads, p), the time step (batch, heads), B
    and C are (batch, G, N), A, D and the bias (heads,), in any dtype.
    """
    return torch.ops.hf_compressm_kernel.scalar_decay_step(state, x, time_step, A, B, C, D, time_step_bias, softplus)


scan = define_scalar_decay_scan("cpp", forward, backward)
