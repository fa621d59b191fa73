"""A model that repeats what it read four symbols ago, trained by a loss of one's own: it has to remember."""

import pytest
import torch
from conftest import build_model, weights_of
from torch.nn.functional import cross_entropy

from hf_compressm import install_scan, parameter_groups

DELAY, SYMBOLS, LENGTH = 4, 8, 32


def delayed_batches(count: int, seed: int = 0) -> list[dict]:
    """Random symbols, and as targets the same, delayed; of text a model could guess, of this it has to remember."""
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(SYMBOLS, (count, 16, LENGTH), generator=generator)
    return [{"input_ids": each, "targets": each.roll(DELAY, 1)} for each in symbols]


def delayed_loss(model, batch) -> tuple[torch.Tensor, int]:
    """The loss of a training loop of one's own: of all positions that have a target."""
    logits, targets = model(input_ids=batch["input_ids"]).logits[:, DELAY:], batch["targets"][:, DELAY:]
    return cross_entropy(logits.flatten(0, 1), targets.flatten()), targets.numel()


def build_delay_model():
    return build_model(vocab_size=SYMBOLS, num_hidden_layers=1)


@torch.no_grad()
def true_loss(model) -> float:
    return sum(delayed_loss(model.eval(), batch)[0].item() for batch in delayed_batches(4, seed=2)) / 4


@pytest.fixture(scope="session")
def delay_weights() -> dict[str, torch.Tensor]:
    install_scan()
    model = build_delay_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=2e-2)
    for batch in delayed_batches(150, seed=1):
        delayed_loss(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.fixture
def delay_model(delay_weights):
    model = build_delay_model()
    model.load_state_dict(delay_weights)
    return model.eval()
