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


def mixer_step(
    hidden, conv_state, state, norm, in_proj, conv1d, dt_bias, A_log, D, groups, projections, gated_norm, out_proj
):
    """Take a step of a whole mixer of Mamba-2: overwrite the states, and return its output, (batch, 1, hidden size).

    Args:
        hidden: its input, (batch, 1, hidden size); it and all other tensors are float32 and contiguous.
        conv_state: the last inputs of the convolution, (batch, D + 2 G N, K).
        state: (batch, heads, p, N), or r for N where B and C are projected.
        norm: weight and ε of an RMS norm before the mixer, whose output is then added to `hidden`; or None and 0.
        in_proj: weight and bias, as those of all layers; a bias may be None.
        groups: G.
        projections: of B and of C, (G, r, N), or None for each.
        gated_norm: weight, ε and the channels of a group of the norm after the gate.
    """
    weights = *norm, *in_proj, *conv1d, dt_bias, A_log, D, groups, *projections, *gated_norm, *out_proj
    return torch.ops.hf_compressm_kernel.scalar_decay_mixer_step.default(hidden, conv_state, state, *weights)


scan = define_scalar_decay_scan("cpp", forward, backward)
