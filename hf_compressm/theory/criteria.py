"""Each criterion here scores the states of a layer, and `choose_states` chooses states by their scores.

A criterion takes a `LayerStates` and returns a score per state, float64, (N,), not negative; a larger score means a
more important state. This file holds mathematics only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .group_criteria import GROUP_CRITERIA, GroupCriterion, GroupStates, pursuit_gains
from .selective import Statistics, Surrogate, complement, gramian_diagonals, unexplained_shares


@dataclass(frozen=True)
class LayerStates:
    """Layer states are what a criterion may look at.

    Attributes:
        statistics: sums over the calibration data.
        B_rows, C_rows: the rows of `x_proj.weight` that make B and C, with weights of norms over them, (N, D) each.
        gradients: gives the gradient of the calibration loss (mean over its predictions) for these rows, (N, D) each.
            It computes them when it is first called, for all layers at once, so a criterion that does not call it
            costs no backward pass. Under FSDP2 it is refused.
        generator: a random generator, seeded for the layer.
    """

    statistics: Statistics
    B_rows: Tensor
    C_rows: Tensor
    gradients: Callable[[], tuple[Tensor, Tensor]]
    generator: torch.Generator


Criterion = Callable[[LayerStates], Tensor]
CRITERIA: dict[str, Criterion] = {}  # by name


def _criterion(power: int, conditional: bool = False) -> Callable[[Criterion], Criterion]:
    """Register a criterion whose score is the amplitude of an error (power 1) or the square of one (power 2).

    A conditional score lacks already what the states before it in the ranking predict of a state.
    """

    def register(function: Criterion) -> Criterion:
        function.power, function.is_conditional = power, conditional
        CRITERIA[function.__name__] = function
        return function

    return register


@_criterion(power=1)
def output(layer: LayerStates) -> Tensor:
    """Return S_n = sqrt(E Σ_d w_d silu(z)_d² (C_n h_dn)²), the error in the layer's output without state n.

    Only state n is removed. The product is taken per sample and then averaged; out_proj's columns are taken as
    orthogonal.
    """
    return (layer.statistics.output_energy / layer.statistics.tokens).sqrt()


@_criterion(power=1)
def second_moment(layer: LayerStates) -> Tensor:
    """Return e_n = Σ_d sqrt(P_d[n, n] Q_d[n, n]) of the mean-square Gramians (see `selective.sampled_gramians`)."""
    return _gramian_score(layer, "second_moment")


@_criterion(power=1)
def mean(layer: LayerStates) -> Tensor:
    """Return e_n = Σ_d sqrt(P_d[n, n] Q_d[n, n]) of the system frozen at its means, as in arXiv 2510.02823."""
    return _gramian_score(layer, "mean")


@_criterion(power=1)
def ghost(layer: LayerStates) -> Tensor:
    """Return sqrt(E Σ_d (C_n h_dn)²), what state n adds to the scan's output before the gate and out_proj.

    This is GHOST (arXiv 2602.11408) with the product taken per sample, where GHOST multiplies the means E[h²] and
    E[C²].
    """
    return (layer.statistics.product_energy / layer.statistics.tokens).sqrt()


@_criterion(power=2, conditional=True)
def greedy(layer: LayerStates) -> Tensor:
    """Return how much of the squared error a state takes away when it is chosen, one after the other.

    The states chosen before explain what they can of Π by least squares, as in `compensation`, but for its ridge; the
    next is the one whose rest, in the metric E[C Cᵀ], is the largest: an orthogonal matching pursuit. C and h are
    taken as independent; the metric, weighted by the gates of the sampled channels, is scaled so that errors of single
    states sum up to those of `output`.
    """
    statistics = layer.statistics
    covariance, metric = statistics.gated_covariance, statistics.sampled_output.sum(0)
    energy = (covariance.diagonal() * metric.diagonal()).sum().clamp_min(1e-300)
    return pursuit_gains(covariance, metric * (statistics.output_energy.sum() / energy)) / statistics.tokens


@_criterion(power=2)
def aire(layer: LayerStates) -> Tensor:
    """Return Σ_d c_n² b_dn² / (1 - λ_dn²), the energy of the impulse response of the system frozen at its means.

    This is the score of AIRE-Prune (arXiv 2602.00534), with λ = E[exp(Δ A)], b = E[Δ B], c = E[C]. It is a squared
    quantity, as it is there.
    """
    x, b, c = _frozen_system(layer)
    return ((c * b).square() / (x * (2 - x))).sum(0)


@_criterion(power=2)
def last(layer: LayerStates) -> Tensor:
    """Return Σ_d c_n² b_dn² / (1 - λ_dn)², the squared peak gain (H∞ norm) of the system frozen at its means.

    This is the score of LAST (arXiv 2411.02824), in the symbols of `aire`. Both papers then normalise the scores of
    each layer, to compare layers; within one layer that leaves the ranking as it is.
    """
    x, b, c = _frozen_system(layer)
    return (c * b / x).square().sum(0)


@_criterion(power=2)
def taylor(layer: LayerStates) -> Tensor:
    """Return |Σ gradient · weight| over the rows of B and C of state n, to first order the loss change without it.

    This is the score of SSM-Pruner (arXiv 2502.18886). Molchanov et al. (arXiv 1906.10771) square this sum for each
    mini-batch and average; here the gradient is that of all calibration data, so that the score depends on neither the
    batches nor the processes they came in, and squaring would leave the ranking as it is. In Mamba the loss depends on
    B_n and C_n through their product alone, so both rows have the same sum.
    """
    B_gradient, C_gradient = layer.gradients()
    return (B_gradient.double() * layer.B_rows + C_gradient.double() * layer.C_rows).sum(1).abs()


@_criterion(power=1)
def magnitude(layer: LayerStates) -> Tensor:
    """Return ‖row n of B‖ ‖row n of C‖, the usual baseline of pruning, which needs weights alone and no data."""
    return (layer.B_rows.double().norm(dim=1) * layer.C_rows.double().norm(dim=1)).to(layer.statistics.tokens.device)


@_criterion(power=1)
def random(layer: LayerStates) -> Tensor:
    """Return uniform draws, the baseline that every other score has to beat."""
    scores = torch.rand(len(layer.B_rows), generator=layer.generator, dtype=torch.float64)
    return scores.to(layer.statistics.tokens.device)


def _gramian_score(layer: LayerStates, surrogate: Surrogate) -> Tensor:
    P, Q = gramian_diagonals(layer.statistics, surrogate)
    return (P * Q).sqrt().sum(0)


def _frozen_system(layer: LayerStates) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1 - λ and b, (D, N) each, and c, (N,).

    The first is not λ, since 1 - λ would then be round-off where a decay is slow.
    """
    s = layer.statistics
    return s.decay / s.tokens, s.input_map / s.tokens, s.output_map / s.tokens


def criterion_name(criterion: Criterion | str) -> str:
    """Return what records call it: the name of one of `CRITERIA`, or of a function of the user's own."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)


def state_scores(criterion: Criterion | GroupCriterion | str, layer: LayerStates | GroupStates) -> Tensor:
    """Return each state's score by a criterion, given by name or as a function of the user's own, float64.

    Returns:
        (N,), or (G, N) of group states.

    Raises:
        ValueError: the user's own function does not give a score for each state.
    """
    has_groups = isinstance(layer, GroupStates)
    if isinstance(criterion, str):
        return (GROUP_CRITERIA if has_groups else CRITERIA)[criterion](layer)
    shape = layer.statistics.state_square.shape if has_groups else layer.B_rows.shape[:1]
    scores = criterion(layer)
    is_tensor = isinstance(scores, Tensor) and not scores.is_complex()
    if not is_tensor or scores.shape != shape or not (scores >= 0).all() or not scores.isfinite().all():
        given = f"shape {tuple(scores.shape)}: {scores}" if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(
            f"criterion {criterion_name(criterion)} gave {given}; allowed: a tensor of {' · '.join(map(str, shape))} "
            "scores, one for each state, finite and ≥ 0."
        )
    return scores.detach().to(layer.statistics.tokens)


def score_power(criterion: Criterion | str) -> int:
    """Return 1 where a score is the amplitude of an error, 2 where it is the square of one.

    A function of the user's own says so by an attribute `power`; without one its scores count as amplitudes.
    """
    return getattr(_function(criterion), "power", 1)


def is_conditional(criterion: Criterion | str | None) -> bool:
    """Say whether the score of a state already lacks what the states before it in the ranking predict of it.

    A function of the user's own says so by an attribute `is_conditional`.
    """
    return getattr(_function(criterion), "is_conditional", False)


def _function(criterion: Criterion | str | None) -> Criterion | GroupCriterion | None:
    """Return the function of a name; what two families call alike has the same attributes in both."""
    return (CRITERIA | GROUP_CRITERIA)[criterion] if isinstance(criterion, str) else criterion


def scores_by_rank(scores: Tensor) -> Tensor:
    """Return the scores in descending order, (N,); of groups, (G, N), the sums of those of equal rank.

    A layer keeps equally many states of each group, so what it gains by the r-th is the sum of what the groups gain.
    """
    return scores.sort(descending=True).values.view(-1, scores.shape[-1]).sum(0)


def squared_errors(scores: Tensor, power: int, covariance: Tensor | None = None) -> Tensor:
    """Return the squared error of the states that go when the r of largest score stay, r = 0 … N, (N + 1,).

    Args:
        scores: (N,), or for groups (G, N), in any order.
        power: the power of the score, see `score_power`.
        covariance: Π, (N, N) or (G, N, N), where kept states make up for dropped ones; only what they do not predict
            then counts.
    """
    if scores.ndim == 2:
        covariances = [None] * len(scores) if covariance is None else covariance
        return sum(squared_errors(of_group, power, own) for of_group, own in zip(scores, covariances, strict=True))
    order, errors = scores.argsort(descending=True), scores.new_zeros(len(scores) + 1)
    single = scores ** (2 // power)
    errors[0] = single.sum()
    for size in range(1, len(scores)):
        kept = order[:size].sort().values
        lost = single[complement(kept, len(scores))]
        errors[size] = (lost if covariance is None else lost * unexplained_shares(covariance, kept)).sum()
    return errors


SELECTIONS = ("largest", "smallest", "random")


def seeded_generator(seed: int, layer: int) -> torch.Generator:
    """Return a generator of the layer's own, so that its draws do not depend on the other layers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + layer)


def choose_states(score: Tensor, size: int, selection: str, generator: torch.Generator) -> Tensor:
    """Return the `size` states to keep, sorted, (r,): those of largest score, or for ablations the smallest or any.

    Args:
        score: (N,), in any order; of groups (G, N), then each keeps so many, (G, r).
        generator: a random generator on the CPU, for the random selection.
    """
    if score.ndim == 2:
        return torch.stack([choose_states(of_group, size, selection, generator) for of_group in score])
    if selection == "random":
        kept = torch.randperm(len(score), generator=generator)[:size].to(score.device)
    else:
        kept = score.topk(size, largest=selection == "largest").indices
    return kept.sort().values
