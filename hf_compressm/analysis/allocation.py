"""Scores and measured losses decide here how many states each layer keeps; neither model nor surgery is needed.

Sizes are allocated in one of three ways. With `uniform` all layers have one size, the largest any layer asks for. With
`per_layer` the goal holds for every layer by itself. With `global` it holds for all of them together, and states of
different layers are ranked by the rise of the loss that dropping them is predicted to cause.
"""

import heapq
from collections.abc import Callable
from itertools import accumulate, pairwise, takewhile
from statistics import mean
from typing import NamedTuple

from torch import Tensor

from ..config import CompreSSMConfig
from ..theory.hankel import truncation_rank

Sizes = dict[int, int]
PROBE = 1 / 8  # the share of its states that a layer keeps while its sensitivity is measured


def choose_sizes(
    config: CompreSSMConfig,
    scores: dict[int, Tensor],
    allocation: str,
    loss_of: Callable[[Sizes], float] | None = None,
    errors: dict[int, Tensor] | None = None,
) -> Sizes:
    """Choose the sizes that the configuration asks for.

    Args:
        config: the goal, and what sizes are allowed.
        scores: layer → score of each state, (N,), in any order.
        allocation: "uniform", "per_layer" or "global".
        loss_of: sizes → measured loss of the model cut to them; needed by a loss budget and a global allocation.
        errors: layer → squared error in its output when its r strongest states are kept, r = 0 … N, (N + 1,); needed
            by a global allocation.

    Returns:
        layer → N.
    """
    uniform = allocation == "uniform"
    sizes = {index: len(score) for index, score in scores.items()}
    scores = {index: score for index, score in scores.items() if index not in config.skip_layers}
    if allocation == "global":
        changes = predicted_changes(config, {index: errors[index] for index in scores}, loss_of)
        wanted = _sizes_for_all_layers(config, _RankedSteps(config, changes), loss_of)
    elif config.target_state_size is not None:
        wanted = dict.fromkeys(sizes, config.target_state_size)
    elif config.cut_fraction is not None:
        largest = max(sizes.values())
        wanted = {
            index: config.round_up((largest if uniform else size) * (1 - config.cut_fraction))
            for index, size in sizes.items()
        }
    elif config.loss_budget is not None:
        wanted = _smallest_within_budget(config, _Candidates(config, scores, uniform), loss_of)
    else:
        wanted = _apply_gate(config, sizes, _sizes_by_tolerance(config, scores, uniform, config.tolerance), uniform)
    return sizes | {index: min(sizes[index], wanted[index]) for index in scores}


def _sizes_by_tolerance(config: CompreSSMConfig, scores: dict[int, Tensor], uniform: bool, tolerance: float) -> Sizes:
    """Return the ranks that the tolerance allows; with one size for all, the largest of them for every layer."""
    ranks = {
        index: min(config.round_up(truncation_rank(score.sort(descending=True).values, tolerance, 0.0)), len(score))
        for index, score in scores.items()
    }
    return dict.fromkeys(ranks, max(ranks.values())) if uniform else ranks


def _apply_gate(config: CompreSSMConfig, sizes: Sizes, wanted: Sizes, uniform: bool) -> Sizes:
    """Keep the size of a layer of which too little would go; with one size for all, the largest layer decides."""
    largest = max(sizes.values())
    return {
        index: size if size < (1 - config.min_reduction) * (largest if uniform else sizes[index]) else sizes[index]
        for index, size in wanted.items()
    }


class _Candidates:
    """The candidates are the sizes that a loss budget chooses from, after the gate, from small to large.

    The last one is the model as it is. With one size for all, the others are every allowed N. With a size per layer,
    each is what one tolerance for all layers allows, from a large tolerance to a small one.
    """

    def __init__(self, config: CompreSSMConfig, scores: dict[int, Tensor], uniform: bool):
        self.config, self.uniform = config, uniform
        self.whole = {index: len(score) for index, score in scores.items()}
        if uniform:
            self.steps = range(config.round_up(1), max(self.whole.values()), config.multiple_of)
        else:
            self.shares = {index: _tail_shares(score) for index, score in scores.items()}
            self.steps = sorted({share for shares in self.shares.values() for share in shares[1:]}, reverse=True)

    def __len__(self) -> int:
        return len(self.steps) + 1

    def __getitem__(self, position: int) -> Sizes:
        if position == len(self.steps):
            return self.whole
        step = self.steps[position]
        if self.uniform:
            wanted = dict.fromkeys(self.whole, step)
        else:
            ranks = {index: sum(share > step for share in shares) for index, shares in self.shares.items()}
            wanted = {index: self.config.round_up(rank) for index, rank in ranks.items()}
        return _apply_gate(self.config, self.whole, wanted, self.uniform)


def _tail_shares(score: Tensor) -> list[float]:
    """Return the share of the score that is lost by keeping r states, for r = 0 … N - 1, descending."""
    tails = score.sort().values.cumsum(0)
    return (tails / tails[-1].clamp_min(1e-300)).flip(0).tolist()


def _smallest_within_budget(
    config: CompreSSMConfig, candidates: "_Candidates | _RankedSteps", loss_of: Callable[[Sizes], float]
) -> Sizes:
    """Return sizes that keep the loss budget while the next smaller ones break it, or the smallest, by bisection."""
    allowed = loss_of(candidates.whole) + config.loss_budget
    breaks, keeps = -1, len(candidates) - 1
    while keeps - breaks > 1:
        middle = (breaks + keeps) // 2
        if loss_of(candidates[middle]) <= allowed:
            keeps = middle
        else:
            breaks = middle
    return candidates[keeps]


def predicted_changes(
    config: CompreSSMConfig, errors: dict[int, Tensor], loss_of: Callable[[Sizes], float]
) -> dict[int, Tensor]:
    """Predict how much the loss rises when a layer keeps r states.

    The rise is κ E, with the squared error E in the layer's output, to which a loss answers in proportion. How
    strongly it does, κ, is measured: each layer alone is cut to an eighth of its states.

    What is measured is a difference of two losses on the same few sequences, and that of one layer is often smaller
    than its noise. Hence the deep cut, which moves the loss by more than that, and all held-out batches. Hence, too,
    no layer's sensitivity rests on its own measurement alone: with rise R_l and error E_l,

        κ_l = (R_l + R̄) / (E_l + Ē),

    as if the average layer, (R̄, Ē), had been measured along with it. A layer with a large error keeps nearly its own
    sensitivity, and one with a small error gets nearly the average. None counts as insensitive: a chance measurement
    would then cost it all its states. A rise below zero counts as none. Where no loss rose, or no output changed so
    that every rise is noise, nothing tells the layers apart: their errors are returned as they are (κ = 1 for all).

    Args:
        config: what sizes are allowed.
        errors: layer → E when r states are kept, r = 0 … N, (N + 1,), descending to zero.
        loss_of: sizes → measured loss of the model cut to them.

    Returns:
        layer → predicted rise of the loss, nats per prediction, (N + 1,).
    """
    whole = {index: len(error) - 1 for index, error in errors.items()}
    before, rises, measured = loss_of(whole), {}, {}
    for index, size in whole.items():
        probe = min(config.round_up(PROBE * size), size)
        rises[index] = max(loss_of(whole | {index: probe}) - before, 0.0)
        measured[index] = float(errors[index][probe])
    mean_rise, mean_error = mean(rises.values()), mean(measured.values())
    if mean_rise == 0 or mean_error == 0:
        return errors
    return {
        index: error * (rises[index] + mean_rise) / (measured[index] + mean_error) for index, error in errors.items()
    }


class _Step(NamedTuple):
    """A step takes a layer to its next smaller allowed size."""

    layer: int
    size: int
    states: int  # how many states go
    change: float  # the predicted change of the loss, nats per prediction
    rank: float  # the steps of all layers are sorted by it


class _RankedSteps:
    """The steps of all layers are ranked by their predicted loss change per state; the first so many are taken.

    As a sequence they are the candidates of a loss budget, after the gate, from small to large, up to the whole model.
    """

    def __init__(self, config: CompreSSMConfig, changes: dict[int, Tensor]):
        self.config, self.whole = config, {index: len(change) - 1 for index, change in changes.items()}
        self.states, self.change = sum(self.whole.values()), sum(float(change[0]) for change in changes.values())
        of_layers = [_layer_steps(config, index, change.tolist()) for index, change in changes.items()]
        self.steps = list(heapq.merge(*of_layers, key=lambda step: step.rank))

    def __len__(self) -> int:
        return len(self.steps) + 1

    def __getitem__(self, position: int) -> Sizes:
        return _apply_gate(self.config, self.whole, self.sizes_after(len(self.steps) - position), False)

    def sizes_after(self, count: int) -> Sizes:
        """Return the sizes after the first `count` steps."""
        return self.whole | {step.layer: step.size for step in self.steps[:count]}

    def sizes_within(self, limit: float, cost: Callable[[_Step], float]) -> Sizes:
        """Return the sizes after as many of the first steps as together cost no more than a limit."""
        totals = accumulate(cost(step) for step in self.steps)
        return self.sizes_after(sum(1 for _ in takewhile(lambda total: total <= limit * (1 + 1e-9), totals)))


def _layer_steps(config: CompreSSMConfig, layer: int, change: list[float]) -> list[_Step]:
    """Return the steps of one layer from all its states down to the smallest allowed size."""
    whole = len(change) - 1
    sizes = [whole, *reversed(range(config.round_up(1), whole, config.multiple_of))]
    steps = list(pairwise(sizes))
    ranks = _ascending_changes([(change[smaller] - change[larger], larger - smaller) for larger, smaller in steps])
    return [
        _Step(layer, smaller, larger - smaller, change[smaller] - change[larger], rank)
        for (larger, smaller), rank in zip(steps, ranks, strict=True)
    ]


def _ascending_changes(steps: list[tuple[float, int]]) -> list[float]:
    """Return the change per state of each step (change, states), ascending, by pooling adjacent violators.

    A step that is followed by a cheaper one is averaged with it, since the second is not taken without the first.
    """
    blocks: list[tuple[float, int, int]] = []  # change, states, steps
    for change, states in steps:
        blocks.append((change, states, 1))
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] > blocks[-1][0] * blocks[-2][1]:
            cheaper = blocks.pop()
            blocks[-1] = tuple(map(sum, zip(blocks[-1], cheaper, strict=True)))
    return [change / states for change, states, count in blocks for _ in range(count)]


def _sizes_for_all_layers(config: CompreSSMConfig, steps: _RankedSteps, loss_of: Callable[[Sizes], float]) -> Sizes:
    """Return the sizes that meet the goal for all layers together."""
    if config.loss_budget is not None:
        return _smallest_within_budget(config, steps, loss_of)
    if config.tolerance is not None:
        wanted = steps.sizes_within(config.tolerance * steps.change, lambda step: step.change)
        return _apply_gate(config, steps.whole, wanted, False)
    if config.target_state_size is not None:
        surplus = steps.states - config.target_state_size * len(steps.whole)
        return steps.sizes_within(surplus, lambda step: step.states)
    return steps.sizes_within(config.cut_fraction * steps.states, lambda step: step.states)
