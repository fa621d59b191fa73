"""The states of a model with scalar decay are measured on data, and kept in either basis: some axes, or balanced."""

from functools import cache

import torch
from torch import Tensor

from ..theory.criteria import Criterion, choose_states, seeded_generator, state_scores
from ..theory.group_criteria import GroupStates, choose_columns, rrqr
from ..theory.plan import GroupSelection, Plan, PlanEntry, Projection, Selection
from ..theory.scalar_decay import (
    balanced_projections,
    expected_squared_error,
    group_singular_values,
    layer_singular_values,
)
from .group_refit import refitted_groups
from .group_statistics import collect_group_statistics
from .measured import MeasuredAnalysis


class ScalarDecayAnalysis(MeasuredAnalysis):
    """A scalar decay analysis measures P and Q of every group, from which both bases follow.

    Attributes:
        scores: layer → score of each state, in stored order, (G, N), or of the balanced ones, descending, (N,).
        gramians: layer → (P, Q), (G, N, N) each.
    """

    collect = staticmethod(collect_group_statistics)

    def rank(self, criterion: Criterion | str) -> None:
        """Set P and Q, and the scores by σ or a criterion."""
        self.gramians = {index: statistics.gramians for index, statistics in self.statistics.items()}
        self._sigma = {index: group_singular_values(statistics) for index, statistics in self.statistics.items()}
        # All of a layer's, once: a loss budget asks for many sizes.
        self._projections = cache(lambda index: balanced_projections(self.statistics[index], len(self.scores[index])))
        self.is_balanced = not self.layers.family.criteria
        if self.is_balanced:
            self.criterion, self.score_power = "hankel", 2
            self.scores = {index: sigma.square() for index, sigma in self.hankel_singular_values().items()}
        else:
            self.scores = self._score(criterion)

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Return layer → σ, (N,), descending; Σ_{i>r} σ_i² is the expected squared error of r balanced states."""
        return {index: layer_singular_values(sigma) for index, sigma in self._sigma.items()}

    def predicted_errors(self, plan: Plan) -> dict[int, float]:
        """Return layer → expected squared error of a plan, before a refit, as a share of Σ σ_i²."""
        errors, spectra = {}, self.hankel_singular_values()
        for index, entry in plan.items():
            squares = spectra[index].square()
            if isinstance(entry, GroupSelection):
                kept = torch.eye(len(squares), dtype=squares.dtype)[entry.kept_states.cpu()].to(squares.device)
                error = expected_squared_error(self.statistics[index], kept, kept)
            else:
                error = squares.sum() - squares[entry.kept_states.to(squares.device)].sum()
            errors[index] = max(float(error / squares.sum().clamp_min(1e-300)), 0.0)
        return errors

    def _score(self, criterion: Criterion | str) -> dict[int, Tensor]:
        """Return layer → score of each state, (G, N)."""
        layers, family, scores = self.layers, self.layers.family, {}
        for index, mixer in layers.items():
            tensors = layers.whole_tensors(index)

            def saliencies(index=index, mixer=mixer, tensors=tensors) -> Tensor:
                return family.saliencies(mixer, tensors, self.gradients()[index])

            generator = seeded_generator(self.config.calibration_seed, index)
            magnitudes = family.magnitudes(mixer, tensors)
            layer = GroupStates(self.statistics[index], magnitudes, saliencies, generator)
            scores[index] = state_scores(criterion, layer)
        return scores

    def entry(self, index: int, size: int) -> PlanEntry:
        """Return what becomes of a layer, in the basis of its family."""
        return self._project(index, size) if self.is_balanced else self._select(index, size)

    def refit(self, plan: Plan) -> Plan:
        """Return the plan with its cut layers refitted, or the plan where that did not lower the loss."""
        return refitted_groups(self.layers, plan, self.gramians, self.objective, self.batches, self.held_out)

    def _select(self, index: int, size: int) -> GroupSelection:
        """Return the states of largest score, or for RRQR a set that swaps improve."""
        if self.criterion == rrqr.__name__ and self.config.selection == "largest":
            return GroupSelection(choose_columns(self.statistics[index], size))
        generator = seeded_generator(self.config.calibration_seed, index)
        return GroupSelection(choose_states(self.scores[index], size, self.config.selection, generator))

    def _project(self, index: int, size: int) -> PlanEntry:
        """Return the projections onto the balanced states of largest σ, after those that the layer has already."""
        whole = self.scores[index]
        if size == len(whole):
            return Selection(torch.arange(size))
        generator = seeded_generator(self.config.calibration_seed, index)
        kept = choose_states(whole, size, self.config.selection, generator)
        present = self.layers.whole_tensors(index)
        every = self._projections(index)
        tensors = {
            path: (projection[:, kept] @ present[path].double())
            for path, projection in zip(("B_proj", "C_proj"), every, strict=True)
        }
        return Projection(kept, tensors)
