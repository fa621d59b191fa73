"""The states of a model with scalar decay are measured on data, and kept in either basis: some axes, or balanced."""

from functools import cache

import torch
from torch import Tensor

from ..architectures import StateLayers
from ..config import CompreSSMConfig
from ..engines import raise_in_all_processes, sum_over_processes
from ..theory.criteria import choose_states, criterion_name, score_power, seeded_generator, state_scores
from ..theory.group_criteria import GroupStates, choose_columns, rrqr
from ..theory.plan import GroupSelection, Plan, PlanEntry, Projection, Selection
from ..theory.scalar_decay import (
    balanced_projections,
    expected_squared_error,
    group_singular_values,
    layer_singular_values,
)
from .collate import Batch
from .group_refit import refitted_groups
from .group_statistics import collect_group_statistics
from .objective import Objective
from .selective import DEFAULT_CRITERION, check_scores, check_tokens, state_gradients


class ScalarDecayAnalysis:
    """A scalar decay analysis measures P and Q of every group, from which both bases follow.

    Args:
        layers: the state layers of a model in eval mode.
        batches: batches for statistics.
        config: what to keep, and how states are scored.
        objective: the loss that the model is trained for.
        held_out: batches that decide whether refits are kept; needed for these only.

    Attributes:
        statistics: layer → sums over the calibration data.
        gramians: layer → (P, Q), (G, N, N) each.
    """

    compensate, covariances = False, None

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
        with raise_in_all_processes():
            self.statistics = collect_group_statistics(layers, batches)
        for statistics in self.statistics.values():
            sum_over_processes(vars(statistics).values())
        self.tokens = int(next(iter(self.statistics.values())).tokens)
        with raise_in_all_processes():
            check_tokens(min(int(statistics.samples) for statistics in self.statistics.values()))
        self.gramians = {index: statistics.gramians for index, statistics in self.statistics.items()}
        self._sigma = {index: group_singular_values(statistics) for index, statistics in self.statistics.items()}
        # All of a layer's, once: a loss budget asks for many sizes.
        self._projections = cache(lambda index: balanced_projections(self.statistics[index], len(self.scores[index])))
        self.is_balanced = not layers.family.criteria
        if self.is_balanced:
            self.criterion, self.score_power = "hankel", 2
            self.scores = {index: sigma.square() for index, sigma in self.hankel_singular_values().items()}
        else:
            criterion = config.criterion or DEFAULT_CRITERION
            self.criterion, self.score_power = criterion_name(criterion), score_power(criterion)
            self.scores = self._score(criterion)
        check_scores(self.scores)

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Return layer → σ, (N,), descending; Σ_{i>r} σ_i² is the expected squared error of r balanced states."""
        return {index: layer_singular_values(sigma) for index, sigma in self._sigma.items()}

    def plan(self, sizes: dict[int, int]) -> Plan:
        """Return what is kept of each layer at these sizes; a plan is made once."""
        key = tuple(sizes[index] for index in self.scores)
        if key not in self._plans:
            choose = self._project if self.is_balanced else self._select
            plan = {index: choose(index, sizes[index]) for index in self.scores}
            if self.config.refit and self.held_out:
                of_all = self.layers, plan, self.gramians, self.objective
                plan = refitted_groups(*of_all, self.batches, self.held_out)
            self._plans[key] = plan
        return self._plans[key]

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

    def _score(self, criterion) -> dict[int, Tensor]:
        """Return layer → score of each state, (G, N)."""
        layers, family, scores = self.layers, self.layers.family, {}
        gradients = cache(lambda: state_gradients(layers, self.batches, self.objective))
        for index, mixer in layers.items():
            tensors = layers.whole_tensors(index)

            def saliencies(index=index, mixer=mixer, tensors=tensors) -> Tensor:
                return family.saliencies(mixer, tensors, gradients()[index])

            generator = seeded_generator(self.config.calibration_seed, index)
            magnitudes = family.magnitudes(mixer, tensors)
            layer = GroupStates(self.statistics[index], magnitudes, saliencies, generator)
            scores[index] = state_scores(criterion, layer)
        return scores

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
