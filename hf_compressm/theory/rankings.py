"""A layer's ranking of states stands still where it moved no further than two calibration draws lie apart.

A ranking is measured on data, so two measurements of one and the same model differ. That difference, taken between two
disjoint draws at one moment, is the noise floor; a movement between two moments, measured on the same draw, counts as
movement only above it. This file holds mathematics only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RELIABLE = 0.5  # τ_b of two draws, three of four pairs in the same order; below it nothing can be said of a ranking


@dataclass(frozen=True)
class Ranking:
    """A ranking says how alike two measurements of a layer's scores are.

    Attributes:
        correlation: Kendall's τ_b of the states, in [-1, 1].
        distance: total variation distance of the score shares, in [0, 1].
    """

    correlation: float
    distance: float


def compare_rankings(left: Tensor, right: Tensor) -> Ranking:
    """Compare two measurements of the scores of the same states, (N,) or for groups (G, N) each."""
    left, right = left.flatten(), right.flatten()
    return Ranking(rank_correlation(left, right), share_distance(left, right))


def is_within_noise(moved: Ranking, noise: Ranking) -> bool:
    """Return whether a layer stands still: its order and score shares moved no further than two draws lie apart.

    There is no margin, since none is needed: what moves is compared on one draw, so that a model that stands still is
    far above the floor. Where the draws themselves hardly agree (τ_b below `RELIABLE`) the answer is no.

    Args:
        moved: an earlier moment compared with now, on one draw.
        noise: two draws compared now.
    """
    is_measurable = noise.correlation >= RELIABLE
    return is_measurable and moved.correlation >= noise.correlation and moved.distance <= noise.distance


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Return Kendall's τ_b = Σ sgn(x_i - x_j) sgn(y_i - y_j) / sqrt(pairs untied in x · pairs untied in y), in O(N²).

    Ties count in neither direction (M. G. Kendall, Biometrika 33, 1945). Values that are all tied have no order to
    compare: the result is 1 where those of both are, otherwise 0.

    Args:
        left, right: scores, (N,) each.
    """
    x, y = (torch.sign(values[:, None] - values[None, :]).double() for values in (left, right))
    untied_x, untied_y = x.abs().sum(), y.abs().sum()
    if untied_x == 0 or untied_y == 0:
        return float(untied_x == untied_y)
    return float((x * y).sum() / (untied_x * untied_y).sqrt())


def share_distance(left: Tensor, right: Tensor) -> float:
    """Return the total variation distance ½ Σ_n |e_n / Σ e - e'_n / Σ e'|, the share of the score that changed states.

    Args:
        left, right: scores, (N,) each, not negative and not all zero.
    """
    return float((left / left.sum() - right / right.sum()).abs().sum() / 2)
