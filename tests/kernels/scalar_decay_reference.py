"""The recurrence with scalar decay written out naively, and inputs to hold the scans against it."""

import torch
import torch.nn.functional as F

OPTIONAL = ("D", "time_step_bias", "initial_state")


def reference_scan(
    x, time_step, A, B, C, D=None, time_step_bias=None, softplus=False, time_step_limit=None, initial_state=None, **_
):
    """The recurrence, a step at a time, for autograd."""
    if time_step_bias is not None:
        time_step = time_step + time_step_bias
    if softplus:
        time_step = torch.log1p(torch.exp(time_step))
    if time_step_limit is not None:
        time_step = time_step.clamp(*time_step_limit)
    B, C = (each.repeat_interleave(x.shape[2] // B.shape[2], 2) for each in (B, C))
    state = x.new_zeros(*x.shape[::2], x.shape[3], B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        step = time_step[:, t, :, None, None]
        state = torch.exp(step * A[:, None, None]) * state + step * x[:, t, :, :, None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1)
    return y if D is None else y + D[:, None] * x, state


def scan_inputs(
    batch=2, length=70, heads=6, head_dim=5, state_size=9, groups=2, dtype=torch.float64, options=OPTIONAL
):
    sizes = (batch, length, heads, head_dim, state_size, groups)
    generator = torch.Generator().manual_seed(sum(10**i * size for i, size in enumerate(sizes)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    time_step, softplus = normal(batch, length, heads), "time_step_bias" in options
    inputs = {
        "x": normal(batch, length, heads, head_dim),
        "time_step": time_step if softplus else F.softplus(time_step),
        "A": -torch.exp(normal(heads)),
        "B": normal(batch, length, groups, state_size),
        "C": normal(batch, length, groups, state_size),
        "D": normal(heads),
        "time_step_bias": normal(heads) - 1,
        "initial_state": normal(batch, heads, head_dim, state_size),
    }
    kept = {name: value.to(dtype) for name, value in inputs.items() if name not in OPTIONAL or name in options}
    return kept | {"softplus": softplus, "time_step_limit": (0.01, 2.0) if softplus else None}


def outputs_and_gradients(scan, inputs) -> dict[str, torch.Tensor]:
    """What a scan gives, and the gradients of a sum in which every entry has a weight of its own."""
    leaves = {name: v.detach().clone().requires_grad_() if torch.is_tensor(v) else v for name, v in inputs.items()}
    y, last_state = scan(**leaves, return_last_state=True)
    loss = sum((each * torch.linspace(-1, 2, each.numel()).to(each).view_as(each)).sum() for each in (y, last_state))
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if torch.is_tensor(leaf)}
    return {"y": y.detach(), "last_state": last_state.detach()} | gradients


def in_float64(inputs):
    return {name: v.double() if torch.is_tensor(v) else v for name, v in inputs.items()}
