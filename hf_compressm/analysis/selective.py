"""The states of a selective model are scored on calibration data, and a plan keeps some of them."""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from ..architectures import StateLayers
from ..config import CompreSSMConfig
from ..engines import raise_in_all_processes, sum_over_processes
from ..kernels.operators import CHUNK
from ..theory.criteria import (
    Criterion,
    LayerStates,
    choose_states,
    criterion_name,
    score_power,
    seeded_generator,
    state_scores,
)
from ..theory.plan import HeadSelection, Plan, Selection
from ..theory.selective import (
    StateMaps,
    Statistics,
    compensation,
    heads_of,
    layer_hankel_singular_values,
    norm_gains,
    weighted_covariance,
)
from .activations import collect_statistics
from .collate import Batch
from .losses import loss_gradients
from .objective import Objective
from .refit import refitted

DEFAULT_CRITERION = "output"


class SelectiveAnalysis:
    """A selective analysis scores states on data; its plans keep some of them, compensated and refitted if asked.

    Args:
        layers: the state layers of a model in eval mode.
        batches: batches for statistics, which refits are fitted to, too.
        config: what to keep, and how states are scored.
        objective: the loss that the model is trained for.
        held_out: batches that decide whether refits are kept; needed for these only.

    Attributes:
        criterion: the name of the score.
        score_power: 1 where the score is the amplitude of an error, 2 where it is the square of one.
        compensate: whether kept states make up for dropped ones.
        tokens: calibration tokens behind the statistics.
        scores: layer → score of each state, in stored order, (N,), or of each head's (heads, N).
        norm_weights: layer → for each head the weights of the norms over B and C, (N,) each, or None without norms.
        covariances: layer → Π, as the rows of C see it, (N, N), or of each head (heads, N, N).
    """

    gramians = None  # a selective layer has no Gramians of its own, only surrogates

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
        self.compensate = config.compensate
        with raise_in_all_processes():
            self.statistics = collect_statistics(layers, batches)
        for statistics in (head for of_layer in self.statistics.values() for head in heads_of(of_layer)):
            sum_over_processes(vars(statistics).values())
        self.tokens = int(heads_of(next(iter(self.statistics.values())))[0].tokens)
        with raise_in_all_processes():
            check_tokens(self.tokens)
        gradients = cache(
            lambda: state_gradients(layers, batches, objective)
        )  # computed for all layers when first asked for
        self.scores = score_states(layers, self.statistics, criterion, gradients, config.calibration_seed)
        self.norm_weights = {
            index: tuple(
                maps.norm_weights for maps in heads_of(layers.family.maps(layers.whole_tensors(index), mixer))
            )
            for index, mixer in layers.items()
        }
        self.covariances = {
            index: like(statistics, map(_covariance, heads_of(statistics), self.norm_weights[index]))
            for index, statistics in self.statistics.items()
        }

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Return layer → σ of its surrogate Gramians, averaged over a sample of channels, (N,), descending."""
        surrogate = "mean" if self.criterion == "mean" else "second_moment"
        return {
            index: torch.stack([layer_hankel_singular_values(head, surrogate) for head in heads_of(statistics)]).mean(
                0
            )
            for index, statistics in self.statistics.items()
        }

    def plan(self, sizes: dict[int, int]) -> Plan:
        """Return what is kept of each layer at these sizes; a plan is made once."""
        key = tuple(sizes[index] for index in self.scores)
        if key not in self._plans:
            plan = self._select(sizes)
            if self.config.refit and self.held_out:
                plan = refitted(self.layers, plan, self.covariances, self.objective, self.batches, self.held_out)
            self._plans[key] = plan
        return self._plans[key]

    def predicted_errors(self, plan: Plan) -> dict[int, float]:
        """Return an empty dict: the singular values of surrogates predict no error."""
        return {}

    def _select(self, sizes: dict[int, int]) -> Plan:
        plan = {}
        for index, scores in self.scores.items():
            generator = seeded_generator(self.config.calibration_seed, index)
            kept = choose_states(scores, sizes[index], self.config.selection, generator)
            if scores.ndim == 1:
                plan[index] = self._selection(index, 0, kept)
            else:
                plan[index] = HeadSelection(tuple(self._selection(index, *each) for each in enumerate(kept)))
        return plan

    def _selection(self, index: int, head: int, kept: Tensor) -> Selection:
        """Return what becomes of one head of a layer that keeps these states."""
        statistics, norm_weights = heads_of(self.statistics[index])[head], self.norm_weights[index][head]
        covariance = self.covariances[index].view(-1, *self.covariances[index].shape[-2:])[head]
        prediction = gains = None
        if self.compensate and len(kept) < len(covariance):
            prediction = compensation(covariance, kept)
        if norm_weights and len(kept) < len(covariance):
            gains = norm_gains(statistics, kept, norm_weights, prediction)
        return Selection(kept, prediction, norm_gains=gains)


def _covariance(statistics: Statistics, norm_weights: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return Π of the states of one head, as the rows of C see it, (N, N)."""
    covariance = statistics.gated_covariance
    return weighted_covariance(covariance, norm_weights[1]) if norm_weights else covariance


def like(part, values: Iterable[Tensor]) -> Tensor:
    """Return the values of all heads, stacked, where a part of a layer is that of several; else the only one."""
    values = list(values)
    return torch.stack(values) if isinstance(part, tuple) else values[0]


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


def score_states(
    layers: StateLayers,
    statistics: dict[int, Statistics],
    criterion: Criterion | str,
    gradients: Callable[[], dict[int, dict[str, Tensor]]],
    seed: int = 0,
) -> dict[int, Tensor]:
    """Return layer → score of each state by a criterion, (N,), or of the states of each head, (heads, N).

    Args:
        layers: the state layers of the model.
        statistics: layer → sums over the calibration data, or those of each head.
        criterion: the name of a criterion, or a function.
        gradients: computes layer → path → gradient for that state tensor.
        seed: the seed of random criteria.

    Raises:
        ValueError: a score is not finite, or all scores of a layer are zero.
    """
    scores = {}
    for index, mixer in layers.items():
        generator, of_layer = seeded_generator(seed, index), layers.family.maps(layers.whole_tensors(index), mixer)

        def score(head: int, maps: StateMaps, index=index, mixer=mixer, generator=generator) -> Tensor:
            weights = [1, 1] if maps.norm_weights is None else [each.unsqueeze(1) for each in maps.norm_weights]

            def gradient_rows() -> tuple[Tensor, Tensor]:
                of_maps = heads_of(layers.family.maps(gradients()[index], mixer))[head]
                return of_maps.B_rows / weights[0], of_maps.C_rows / weights[1]

            rows = maps.B_rows * weights[0], maps.C_rows * weights[1]
            return state_scores(
                criterion, LayerStates(heads_of(statistics[index])[head], *rows, gradient_rows, generator)
            )

        scores[index] = like(of_layer, (score(*each) for each in enumerate(heads_of(of_layer))))
    check_scores(scores)
    return scores


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
