"""The states of a selective model are scored on calibration data, and a plan keeps some of them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..theory.criteria import Criterion, LayerStates, choose_states, seeded_generator, state_scores
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
from .measured import MeasuredAnalysis
from .refit import refitted


class SelectiveAnalysis(MeasuredAnalysis):
    """A selective analysis scores states on data; its plans keep some of them, compensated and refitted if asked.

    It has no Gramians of its own, only surrogates.

    Attributes:
        compensate: whether kept states make up for dropped ones.
        scores: layer → score of each state, in stored order, (N,), or of each head's (heads, N).
        norm_weights: layer → for each head the weights of the norms over B and C, (N,) each, or None without norms.
        covariances: layer → Π, as the rows of C see it, (N, N), or of each head (heads, N, N).
    """

    collect = staticmethod(collect_statistics)

    def rank(self, criterion: Criterion | str) -> None:
        """Set the scores by a criterion, the weights of the norms, and Π."""
        layers = self.layers
        self.compensate = self.config.compensate
        self.scores = {index: self._score(index, criterion) for index in layers}
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

    def predicted_errors(self, plan: Plan) -> dict[int, float]:
        """Return an empty dict: the singular values of surrogates predict no error."""
        return {}

    def _score(self, index: int, criterion: Criterion | str) -> Tensor:
        """Return the score of each state of a layer, (N,), or of the states of each head, (heads, N)."""
        layers, mixer = self.layers, self.layers[index]
        of_layer = layers.family.maps(layers.whole_tensors(index), mixer)
        generator = seeded_generator(self.config.calibration_seed, index)

        def score(head: int, maps: StateMaps) -> Tensor:
            weights = [1, 1] if maps.norm_weights is None else [each.unsqueeze(1) for each in maps.norm_weights]

            def gradient_rows() -> tuple[Tensor, Tensor]:
                of_maps = heads_of(layers.family.maps(self.gradients()[index], mixer))[head]
                return of_maps.B_rows / weights[0], of_maps.C_rows / weights[1]

            rows, statistics = (maps.B_rows * weights[0], maps.C_rows * weights[1]), heads_of(self.statistics[index])
            return state_scores(criterion, LayerStates(statistics[head], *rows, gradient_rows, generator))

        return like(of_layer, (score(*each) for each in enumerate(heads_of(of_layer))))

    def entry(self, index: int, size: int) -> Selection | HeadSelection:
        """Return the states of largest score, and how they make up for the others."""
        scores, generator = self.scores[index], seeded_generator(self.config.calibration_seed, index)
        kept = choose_states(scores, size, self.config.selection, generator)
        if scores.ndim == 1:
            return self._selection(index, 0, kept)
        return HeadSelection(tuple(self._selection(index, *each) for each in enumerate(kept)))

    def refit(self, plan: Plan) -> Plan:
        """Return the plan with its cut layers refitted, or the plan where that did not lower the loss."""
        return refitted(self.layers, plan, self.covariances, self.objective, self.batches, self.held_out)

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
