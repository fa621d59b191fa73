"""Models that need data are analysed alike: sums over it, scores of states by them, and plans that are made once."""

from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import Tensor

from ..architectures import StateLayers
from ..config import CompreSSMConfig
from ..engines import raise_in_all_processes, sum_over_processes
from ..kernels.operators import CHUNK
from ..theory.criteria import Criterion, criterion_name, score_power
from ..theory.plan import Plan, PlanEntry
from ..theory.selective import heads_of
from .collate import Batch
from .losses import loss_gradients
from .objective import Objective

DEFAULT_CRITERION = "output"


class MeasuredAnalysis(ABC):
    """A measured analysis scores states by what they do on data; its plans are refitted if asked.

    Args:
        layers: the state layers of a model in eval mode.
        batches: batches for statistics, which refits are fitted to, too.
        config: what to keep, and how states are scored.
        objective: the loss that the model is trained for.
        held_out: batches that decide whether refits are kept; needed for these only.

    Attributes:
        statistics: layer → sums over the calibration data, or those of each head.
        tokens: calibration tokens behind the statistics.
        criterion: the name of the score.
        score_power: 1 where the score is the amplitude of an error, 2 where it is the square of one.
        gradients: computes, when first asked, layer → path → gradient for that state tensor.
        scores: layer → score of each state.
    """

    scores: dict[int, Tensor]
    compensate, covariances, gramians = False, None, None

    def __init__(
        self,
        layers: StateLayers,
        batches: list[Batch],
        config: CompreSSMConfig,
        objective: Objective,
        held_out: list[Batch] | None = None,
    ):
        self.layers, self.config, self.objective = layers, config, objective
        self.batches, self.held_out = batches, held_out
        self._plans: dict[tuple[int, ...], Plan] = {}
        criterion = config.criterion or DEFAULT_CRITERION
        self.criterion, self.score_power = criterion_name(criterion), score_power(criterion)
        with raise_in_all_processes():
            self.statistics = self.collect(layers, batches)
        parts = [part for of_layer in self.statistics.values() for part in heads_of(of_layer)]
        for part in parts:
            sum_over_processes(vars(part).values())
        self.tokens = int(parts[0].tokens)
        with raise_in_all_processes():
            check_tokens(min(int(part.samples) for part in parts))
        self.gradients = cache(lambda: state_gradients(layers, batches, objective))
        self.rank(criterion)
        check_scores(self.scores)

    @staticmethod
    @abstractmethod
    def collect(layers: StateLayers, batches: list[Batch]) -> dict:
        """Return layer → sums over the batches, or those of each head, from forward passes in eval mode."""

    @abstractmethod
    def rank(self, criterion: Criterion | str) -> None:
        """Set the scores by a criterion, and what else plans are made of."""

    @abstractmethod
    def entry(self, index: int, size: int) -> PlanEntry:
        """Return what becomes of a layer that keeps so many states, before a refit."""

    @abstractmethod
    def refit(self, plan: Plan) -> Plan:
        """Return the plan with its cut layers refitted, or the plan where that did not lower the loss."""

    def plan(self, sizes: dict[int, int]) -> Plan:
        """Return what is kept of each layer at these sizes; a plan is made once."""
        key = tuple(sizes[index] for index in self.scores)
        if key not in self._plans:
            plan = {index: self.entry(index, sizes[index]) for index in self.scores}
            self._plans[key] = self.refit(plan) if self.config.refit and self.held_out else plan
        return self._plans[key]


def check_tokens(count: int) -> None:
    """Refuse statistics over nothing.

    Raises:
        ValueError: states were sampled at no position.
    """
    if count == 0:
        raise ValueError(
            f"the calibration sequences are too short: states are sampled every {CHUNK} positions, and all of these "
            "are padding. Give longer sequences, or pad on the left."
        )


def check_scores(scores: dict[int, Tensor]) -> None:
    """Refuse scores that rank nothing.

    Raises:
        ValueError: a score is not finite, or all scores of a layer are zero.
    """
    for index, of_layer in scores.items():
        if not torch.isfinite(of_layer).all() or of_layer.sum() <= 0:
            raise ValueError(
                f"layer {index}: the state scores are not finite, or all zero. The model's activations overflow or "
                "its weights are degenerate; nothing was changed."
            )


def state_gradients(layers: StateLayers, batches: list[Batch], objective: Objective) -> dict[int, dict[str, Tensor]]:
    """Return layer → path → gradient of the mean loss for that state tensor, float64.

    Raises:
        ValueError: the loss is not known.
    """
    reason = objective.unknown_on(batches)
    if reason is not None:
        raise ValueError(f"the criterion asks for the gradients of the loss, and {reason}: give analyze(…, loss=…).")
    names = {
        index: {path: layers.parameter_name(index, path) for path in layers.parameters(index)} for index in layers
    }
    gradients = loss_gradients(objective, batches, [name for paths in names.values() for name in paths.values()])
    return {index: {path: gradients[name] for path, name in paths.items()} for index, paths in names.items()}
