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


scan = define_scalar_decay_scan("cpp", forward, backward)
