"""The recurrence of the selective scan written out naively, and inputs and a model to hold the scans against it."""

import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

OPTIONAL = ("D", "gate", "time_step_bias", "initial_state")


def reference_scan(
    u, time_step, A, B, C, D=None, gate=None, time_step_bias=None, softplus=False, initial_state=None, **_
):
    """The recurrence, a step at a time, for autograd."""
    if time_step_bias is not None:
        time_step = time_step + time_step_bias[None, :, None]
    if softplus:
        time_step = torch.log1p(torch.exp(time_step))
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[2]):
        step = time_step[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[:, None, :, t]
        outputs.append((C[:, None, :, t] * h).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[None, :, None] * u
    if gate is not None:
        y = y * gate * torch.sigmoid(gate)
    return y, h


def scan_inputs(batch=3, channels=7, state_size=17, length=37, dtype=torch.float64, options=OPTIONAL):
    generator = torch.Generator().manual_seed(batch + 10 * channels + 100 * state_size + 1000 * length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    time_step = normal(batch, channels, length)
    softplus = "time_step_bias" in options
    inputs = {
        "u": normal(batch, channels, length),
        "time_step": time_step if softplus else F.softplus(time_step),
        "A": -torch.exp(normal(channels, state_size)),
        "B": normal(batch, state_size, length),
        "C": normal(batch, state_size, length),
        "D": normal(channels),
        "gate": normal(batch, channels, length),
        "time_step_bias": normal(channels) - 1,
        "initial_state": normal(batch, channels, state_size),
    }
    kept = {name: value.to(dtype) for name, value in inputs.items() if name not in OPTIONAL or name in options}
    return kept | {"softplus": softplus}


def require_gradients(inputs):
    return {name: v.clone().requires_grad_() if torch.is_tensor(v) else v for name, v in inputs.items()}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def small_model(**options):
    """Random enough that every parameter matters: S4D's initial decays are the same in every channel."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=7, **options)
    model = MambaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if "mixer" in name else 0)
    return model


def token_ids(batch=3, length=21):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))
