"""Ways to score the states of a layer: one function each, larger is more important. And ways to choose by the scores.

A criterion takes a `LayerStates` and returns an energy per state, float64, (N,), not negative. Mathematics only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .selective import Statistics, Surrogate, gramian_diagonals


@dataclass(frozen=True)
class LayerStates:
    """What a criterion may look at.

    Attributes:
        statistics: sums over the calibration data.
        B_rows, C_rows: the rows of `x_proj.weight` that make B and C, (N, D) each.
        generator: seeded for the layer.
    """

    statistics: Statistics
    B_rows: Tensor
    C_rows: Tensor
    generator: torch.Generator


Criterion = Callable[[LayerStates], Tensor]


def output(layer: LayerStates) -> Tensor:
    """S_n = sqrt(E Σ_d w_d silu(z)_d² (C_n h_dn)²): the error in the layer's output when state n alone is removed.

    The product is taken per sample and then averaged; out_proj's columns are taken as orthogonal.
    """
    return (layer.statistics.output_energy / layer.statistics.tokens).sqrt()


def second_moment(layer: LayerStates) -> Tensor:
    """e_n = Σ_d sqrt(P_d[n, n] Q_d[n, n]) of the mean-square Gramians (see `selective.sampled_gramians`)."""
    return _gramian_energy(layer, "second_moment")


def mean(layer: LayerStates) -> Tensor:
    """e_n = Σ_d sqrt(P_d[n, n] Q_d[n, n]) of the system frozen at its means: the surrogate of arXiv 2510.02823."""
    return _gramian_energy(layer, "mean")


def magnitude(layer: LayerStates) -> Tensor:
    """‖row n of B‖ ‖row n of C‖: weights alone, no data; the usual baseline of pruning."""
    return (layer.B_rows.double().norm(dim=1) * layer.C_rows.double().norm(dim=1)).to(layer.statistics.tokens.device)


def random(layer: LayerStates) -> Tensor:
    """Uniform draws: the baseline that every other score has to beat."""
    scores = torch.rand(len(layer.B_rows), generator=layer.generator, dtype=torch.float64)
    return scores.to(layer.statistics.tokens.device)


def _gramian_energy(layer: LayerStates, surrogate: Surrogate) -> Tensor:
    P, Q = gramian_diagonals(layer.statistics, surrogate)
    return (P * Q).sqrt().sum(0)


CRITERIA: dict[str, Criterion] = {
    function.__name__: function for function in (output, second_moment, mean, magnitude, random)
}

SELECTIONS = ("largest", "smallest", "random")


def seeded_generator(seed: int, layer: int) -> torch.Generator:
    """A generator of the layer's own, so that its draws do not depend on the other layers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + layer)


def choose_states(energy: Tensor, size: int, selection: str, generator: torch.Generator) -> Tensor:
    """The `size` states to keep, sorted, (r,): those of largest energy, or for ablations the smallest or any.

    Args:
        energy: (N,), in any order.
        generator: on the CPU, for the random selection.
    """
    if selection == "random":
        keep = torch.randperm(len(energy), generator=generator)[:size].to(energy.device)
    else:
        keep = energy.topk(size, largest=selection == "largest").indices
    return keep.sort().values
