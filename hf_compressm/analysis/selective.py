"""Selective models: what calibration data says of their states, and which of them are kept."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from ..architectures.family import STATE_INPUT, STATE_OUTPUT, layout_of, projection_rows, state_layers
from ..config import CompreSSMConfig
from ..engines import full_tensor, raise_in_all_processes, sum_over_processes
from ..kernels.operators import CHUNK
from ..theory.criteria import Criterion, LayerStates, choose_states, criterion_name, seeded_generator, state_scores
from ..theory.plan import Plan, Selection
from ..theory.selective import Statistics, compensation, complement, layer_hankel_singular_values, unexplained_shares
from .activations import collect_statistics
from .calibration import Batch
from .losses import loss_gradients, parameter_names
from .masking import masked_parameters
from .refit import refitted

DEFAULT_CRITERION = "output"


class SelectiveAnalysis:
    """The states of a selective model, scored on data; a plan keeps some of them, compensated and refitted if asked.

    Args:
        batches: for statistics, and for refits to be fitted to.
        held_out: batches by which refits are judged; needed for these only.

    Attributes:
        criterion: name of the score.
        compensate: whether kept states make up for dropped ones.
        tokens: calibration tokens behind the statistics.
        scores: layer → score of each state, in stored order, (N,).
    """

    def __init__(
        self, model: nn.Module, batches: list[Batch], config: CompreSSMConfig, held_out: list[Batch] | None = None
    ):
        self.model, self.config, self.batches, self.held_out = model, config, batches, held_out
        self._plans: dict[tuple[int, ...], Plan] = {}
        criterion = config.criterion or DEFAULT_CRITERION
        self.criterion, self.compensate = criterion_name(criterion), config.compensate
        with raise_in_all_processes():
            self.statistics = collect_statistics(model, batches)
        for statistics in self.statistics.values():
            sum_over_processes(vars(statistics).values())
        self.tokens = int(next(iter(self.statistics.values())).tokens)
        with raise_in_all_processes():
            if self.tokens == 0:
                raise ValueError(
                    f"the calibration sequences are too short: states are sampled every {CHUNK} positions, and all of "
                    "these are padding. Give longer sequences, or pad on the left."
                )
        gradients = cache(lambda: projection_gradients(model, batches))  # for all layers, when first asked for
        self.scores = score_states(model, self.statistics, criterion, gradients, config.calibration_seed)

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Layer → σ of its surrogate Gramians, averaged over a sample of channels, (N,), descending."""
        surrogate = "mean" if self.criterion == "mean" else "second_moment"
        return {index: layer_hankel_singular_values(s, surrogate) for index, s in self.statistics.items()}

    def squared_errors(self) -> dict[int, Tensor]:
        """Layer → Σ e² of the states that go when the r strongest stay, r = 0 … N, (N + 1,).

        Of a compensated state only what the others do not predict counts.
        """
        errors = {}
        for index, score in self.scores.items():
            order, covariance = score.argsort(descending=True), self.statistics[index].gated_covariance
            errors[index] = score.new_zeros(len(score) + 1)
            errors[index][0] = score.square().sum()
            for size in range(1, len(score)):
                keep = order[:size].sort().values
                lost = score[complement(keep, len(score))].square()
                lost = lost * unexplained_shares(covariance, keep) if self.compensate else lost
                errors[index][size] = lost.sum()
        return errors

    def gramians(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Nothing: a selective layer has no Gramians of its own, only surrogates."""
        return {}

    def plan(self, sizes: dict[int, int]) -> Plan:
        """What is kept of each layer at these sizes; a plan is made once."""
        key = tuple(sizes[index] for index in self.scores)
        if key not in self._plans:
            plan = self._selected(sizes)
            if self.config.refit and self.held_out:
                covariances = {index: statistics.gated_covariance for index, statistics in self.statistics.items()}
                plan = refitted(self.model, plan, covariances, self.batches, self.held_out)
            self._plans[key] = plan
        return self._plans[key]

    def _selected(self, sizes: dict[int, int]) -> Plan:
        plan = {}
        for index, score in self.scores.items():
            size, whole = sizes[index], len(score)
            generator = seeded_generator(self.config.calibration_seed, index)
            keep = choose_states(score, size, self.config.selection, generator)
            covariance = self.statistics[index].gated_covariance
            plan[index] = Selection(keep, compensation(covariance, keep) if self.compensate and size < whole else None)
        return plan

    def overrides(self, plan: Plan) -> dict[str, Tensor]:
        """Parameter name → value, for the layers that the plan cuts; see `masking`."""
        return masked_parameters(self.model, plan)


def projection_gradients(model: nn.Module, batches: list[Batch]) -> dict[int, Tensor]:
    """Layer → gradient of the mean loss over all predictions for the layer's projection, float64."""
    layout, names = layout_of(model), parameter_names(model)
    paths = {i: names[mixer.get_parameter(layout.projection)] for i, mixer in state_layers(model).items()}
    gradients = loss_gradients(model, batches, paths.values())
    return {index: gradients[name] for index, name in paths.items()}


def score_states(
    model: nn.Module,
    statistics: dict[int, Statistics],
    criterion: Criterion | str,
    gradients: Callable[[], dict[int, Tensor]],
    seed: int = 0,
) -> dict[int, Tensor]:
    """Layer → score of each state by a criterion, (N,).

    Args:
        gradients: layer → gradient for its projection, when it is called.

    Raises:
        ValueError: a score is not finite, or a layer has none at all.
    """
    layout, scores = layout_of(model), {}
    for index, mixer in state_layers(model).items():
        projection = full_tensor(mixer.get_parameter(layout.projection).detach())
        B, C = (projection_rows(mixer, layout, block) for block in (STATE_INPUT, STATE_OUTPUT))
        layer = LayerStates(
            statistics=statistics[index],
            B_rows=projection[B],
            C_rows=projection[C],
            gradients=lambda index=index, B=B, C=C: (gradients()[index][B], gradients()[index][C]),
            generator=seeded_generator(seed, index),
        )
        scores[index] = state_scores(criterion, layer)
        if not torch.isfinite(scores[index]).all() or scores[index].sum() <= 0:
            raise ValueError(
                f"layer {index}: the state scores are not finite, or all zero. The model's activations overflow or "
                "its weights are degenerate; nothing was changed."
            )
    return scores
