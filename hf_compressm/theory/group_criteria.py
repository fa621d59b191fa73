"""The criteria here score or choose the states of a layer with scalar decay, in each group of heads by itself.

A criterion takes a `GroupStates` and returns a score per state, float64, (G, N), not negative; a larger score means a
more important state. Two of them, `rrqr` and `greedy`, look at sets of states: a state that another one stands for
then counts for little. This file holds mathematics only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from .scalar_decay import GroupStatistics

SWAP_GAIN = 2.0  # a swap has to multiply the volume of the kept columns by this much, at least
AHEAD = 1e-9  # by this share a state's score is above that of the next one where both would be equal


@dataclass(frozen=True)
class GroupStates:
    """Group states are what a criterion may look at.

    Attributes:
        statistics: sums over the calibration data.
        magnitudes: ‖row of in_proj‖ · ‖convolution taps‖ of the channels of B and of C, (G, N) each.
        saliencies: gives the sums of gradient · weight over the convolution taps and biases of the channels of B and
            C, (G, N): to first order the change of the calibration loss if both were zero, which is how a state is
            masked. It computes them when it is first called, for all layers at once. Under FSDP2 it is refused.
        generator: a random generator, seeded for the layer.
    """

    statistics: GroupStatistics
    magnitudes: tuple[Tensor, Tensor]
    saliencies: Callable[[], Tensor]
    generator: torch.Generator


GroupCriterion = Callable[[GroupStates], Tensor]
GROUP_CRITERIA: dict[str, GroupCriterion] = {}  # by name


def _criterion(power: int, conditional: bool = False) -> Callable[[GroupCriterion], GroupCriterion]:
    """Register a criterion whose score is the amplitude of an error (power 1) or the square of one (power 2).

    A conditional score lacks already what the states before it in the ranking predict of a state.
    """

    def register(function: GroupCriterion) -> GroupCriterion:
        function.power, function.is_conditional = power, conditional
        GROUP_CRITERIA[function.__name__] = function
        return function

    return register


@_criterion(power=1)
def output(layer: GroupStates) -> Tensor:
    """Return sqrt(E Σ w (C_n h_n)²), the error in the layer's output without state n; only state n is removed."""
    return (layer.statistics.contribution_square / layer.statistics.samples).sqrt()


@_criterion(power=1)
def ghost(layer: GroupStates) -> Tensor:
    """Return sqrt(E[h_n²] E[C_n²]), the score of GHOST (arXiv 2602.11408), summed over the channels of the group."""
    _, Q = layer.statistics.gramians
    return (layer.statistics.state_square / layer.statistics.samples * Q.diagonal(dim1=-2, dim2=-1)).sqrt()


@_criterion(power=1)
def magnitude(layer: GroupStates) -> Tensor:
    """Return the magnitude of B_n times that of C_n, the usual baseline of pruning, which needs weights alone."""
    of_B, of_C = layer.magnitudes
    return (of_B.double() * of_C.double()).to(layer.statistics.tokens.device)


@_criterion(power=2)
def taylor(layer: GroupStates) -> Tensor:
    """Return |Σ gradient · weight| over the channels of state n, to first order the loss change without it.

    As for Mamba-1 (SSM-Pruner, arXiv 2502.18886) the gradient is that of all calibration data.
    """
    return layer.saliencies().double().abs()


@_criterion(power=1)
def random(layer: GroupStates) -> Tensor:
    """Return uniform draws, the baseline that every other score has to beat."""
    shape = layer.statistics.state_square.shape
    scores = torch.rand(shape, generator=layer.generator, dtype=torch.float64)
    return scores.to(layer.statistics.tokens.device)


@_criterion(power=1, conditional=True)
def rrqr(layer: GroupStates) -> Tensor:
    """Return |R_kk| of a QR decomposition with column pivots of stacked B and C, in the place of the state of pivot k.

    Columns are the states, rows the tokens of B and of C, each scaled to mean square one (arXiv 2602.04852). What a
    column has beyond those chosen before it is |R_kk|, which never rises. `choose_columns` improves the choice.
    """
    return torch.stack([_pivoted(gram)[1] for gram in _stacked_gram(layer.statistics)]).sqrt()


@_criterion(power=2, conditional=True)
def greedy(layer: GroupStates) -> Tensor:
    """Return how much of the expected squared error a state takes away when it is chosen, one after the other.

    The states chosen before explain what they can of P, by least squares; the next is the one whose rest, in the
    metric Q, is the largest: an orthogonal matching pursuit.
    """
    return torch.stack([pursuit_gains(P, Q) for P, Q in zip(*layer.statistics.gramians, strict=True)])


def choose_columns(statistics: GroupStatistics, size: int) -> Tensor:
    """Return the states that a strong rank-revealing QR decomposition of stacked B and C keeps, sorted, (G, r).

    The first r pivots are improved by swaps, each of which at least doubles the volume of the kept columns (Gu and
    Eisenstat, SIAM J. Sci. Comput. 17, 1996, algorithm 4 with f = 2).
    """
    kept = []
    for gram in _stacked_gram(statistics):
        order = _pivoted(gram)[0]
        kept.append(_swapped(gram, order[:size]).sort().values)
    return torch.stack(kept)


def _stacked_gram(statistics: GroupStatistics) -> Tensor:
    """Return the Gram matrix of the columns of B stacked on C, (G, N, N), where both weigh the same."""
    grams = (statistics.input_covariance, statistics.output_covariance)
    traces = (gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-300)[:, None, None] for gram in grams)
    return sum(gram / trace for gram, trace in zip(grams, traces, strict=True))


def _pivoted(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pivots of a QR decomposition by its Gram matrix, in order, and R_kk² of each column, (N,) each."""
    rest, order, squares = gram.clone(), [], gram.new_zeros(len(gram))
    for _ in range(len(gram)):
        left = rest.diagonal().clone()
        left[order] = -1
        pivot = int(left.argmax())
        squares[pivot] = left[pivot].clamp_min(0)
        order.append(pivot)
        rest = rest - torch.outer(rest[:, pivot], rest[pivot]) / rest[pivot, pivot].clamp_min(1e-300)
    return torch.tensor(order, device=gram.device), squares


def _swapped(gram: Tensor, kept: Tensor) -> Tensor:
    """Exchange kept columns for others while that multiplies their volume by `SWAP_GAIN`."""
    kept, ridge = kept.clone(), 1e-12 * gram.diagonal().mean()
    others = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    others[kept] = False
    others = others.nonzero().squeeze(1)
    for _ in range(len(gram) ** 2 if len(others) else 0):
        inverse = torch.linalg.inv(gram[kept][:, kept] + ridge * torch.eye(len(kept)).to(gram))
        maps = inverse @ gram[kept][:, others]  # R_11^-1 R_12, (r, N - r)
        rest = (gram[others, others] - (gram[kept][:, others] * maps).sum(0)).clamp_min(0)
        gains = (maps.square() + inverse.diagonal()[:, None] * rest).sqrt()  # of the volume, by each swap
        best = int(gains.argmax())
        leaving, entering = divmod(best, len(others))
        if gains[leaving, entering] <= SWAP_GAIN:
            break
        kept[leaving], others[entering] = others[entering].clone(), kept[leaving].clone()
    return kept


def pursuit_gains(P: Tensor, Q: Tensor) -> Tensor:
    """Return by how much tr Q (P - P_:K P_KK⁻¹ P_K:) falls when `greedy` adds each state to K, (N,).

    States may be worth little before, and much beside, each other. Where a gain is thus larger than the one before it,
    both count as their mean: the order of the scores is that of the choices, and their sum the whole error.
    """
    rest, rest_Q, chosen, gains = P, P @ Q, [], P.new_zeros(len(P))
    floor = 1e-12 * P.diagonal().max()
    for _ in range(len(P)):
        gain = (rest_Q * rest.mT).sum(1) / rest.diagonal().clamp_min(floor)
        gain[chosen] = -1
        state = int(gain.argmax())
        gains[state] = gain[state].clamp_min(0)
        chosen.append(state)
        share = rest[:, state] / rest[state, state].clamp_min(floor)
        rest, rest_Q = (each - torch.outer(share, each[state]) for each in (rest, rest_Q))
    gains[chosen] = _falling(gains[chosen])
    return gains


def _falling(values: Tensor) -> Tensor:
    """Return the nearest values that never rise, (N,): means over stretches, in which those before stay just ahead."""
    stretches: list[list[float]] = []
    for value in values.tolist():
        stretches.append([value])
        while len(stretches) > 1 and fmean(stretches[-1]) > fmean(stretches[-2]):
            last = stretches.pop()
            stretches[-1] += last
    means = [fmean(stretch) * (1 - AHEAD * place) for stretch in stretches for place in range(len(stretch))]
    return values.new_tensor(means)
