"""Selective models: what calibration data says of their states, and which of them are kept."""

import torch
from torch import Tensor, nn

from .calibration import Batch
from .config import CompreSSMConfig
from .criteria import CRITERIA, LayerStates, choose_states, seeded_generator
from .engines import full, sum_over_processes, together
from .kernels import observed_scan
from .kernels.operators import CHUNK
from .layouts import (
    STATE_INPUT,
    STATE_OUTPUT,
    SelectiveLayout,
    layout_of,
    projection_rows,
    state_layers,
    state_size,
)
from .measurement import forward, parameter_names
from .selective import Statistics, compensation, complement, layer_hankel_singular_values
from .surgery import Plan, Selection, compensated_output_rows

DEFAULT_CRITERION = "output"


class SelectiveAnalysis:
    """The states of a selective model, scored on data; a plan keeps some of them as they are, compensated.

    Attributes:
        criterion: name of the score.
        compensate: whether kept states make up for dropped ones.
        tokens: calibration tokens behind the statistics.
        energies: layer → energy of each state, in stored order, (N,).
    """

    def __init__(self, model: nn.Module, batches: list[Batch], config: CompreSSMConfig):
        self.model, self.config = model, config
        self.criterion, self.compensate = config.criterion or DEFAULT_CRITERION, config.compensate
        with together():
            self.statistics = collect_statistics(model, batches)
        for statistics in self.statistics.values():
            sum_over_processes(vars(statistics).values())
        self.tokens = int(next(iter(self.statistics.values())).tokens)
        with together():
            if self.tokens == 0:
                raise ValueError(
                    f"the calibration sequences are too short: states are sampled every {CHUNK} positions, and all of "
                    "these are padding. Give longer sequences, or pad on the left."
                )
        self.energies = score_states(model, self.statistics, self.criterion, config.calibration_seed)

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Layer → σ of its surrogate Gramians, averaged over a sample of channels, (N,), descending."""
        surrogate = "mean" if self.criterion == "mean" else "second_moment"
        return {index: layer_hankel_singular_values(s, surrogate) for index, s in self.statistics.items()}

    def gramians(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Nothing: a selective layer has no Gramians of its own, only surrogates."""
        return {}

    def plan(self, sizes: dict[int, int]) -> Plan:
        """What is kept of each layer at these sizes."""
        plan = {}
        for index, energy in self.energies.items():
            size, whole = sizes[index], len(energy)
            generator = seeded_generator(self.config.calibration_seed, index)
            keep = choose_states(energy, size, self.config.selection, generator)
            covariance = self.statistics[index].gated_covariance
            plan[index] = Selection(keep, compensation(covariance, keep) if self.compensate and size < whole else None)
        return plan

    def overrides(self, plan: Plan) -> dict[str, Tensor]:
        """Parameter name → value, for the layers that the plan cuts; see `masked_projection`."""
        layout, names, masked = layout_of(self.model), parameter_names(self.model), {}
        for index, mixer in state_layers(self.model).items():
            if index in plan and len(plan[index].keep) < state_size(mixer, layout):
                parameter = mixer.get_parameter(layout.projection)
                masked[names[parameter]] = masked_projection(mixer, layout, plan[index])
        return masked


def collect_statistics(model: nn.Module, batches: list[Batch]) -> dict[int, Statistics]:
    """Layer → `Statistics` over the batches, from forward passes of an unwrapped model in eval mode."""
    layout, mixers = layout_of(model), state_layers(model)
    statistics = {
        index: Statistics.empty(*mixer.get_parameter(layout.decay).shape, device=next(mixer.parameters()).device)
        for index, mixer in mixers.items()
    }
    weights = {
        i: full(m.get_parameter(layout.output_projection).detach()).double().square().sum(0) for i, m in mixers.items()
    }
    running: list[int] = []  # the layer whose scan comes next
    handles = [
        mixer.register_forward_pre_hook(lambda module, args, index=index: running.append(index))
        for index, mixer in mixers.items()
    ]
    mask = None

    def observer(positions, **sample):
        index = running.pop()
        counted = None if mask is None else mask[:, positions]
        statistics[index].accumulate(**sample, channel_weight=weights[index], mask=counted)

    try:
        with observed_scan(observer):
            for batch in batches:
                mask = batch.get("attention_mask")
                forward(model, batch, {})
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def score_states(
    model: nn.Module, statistics: dict[int, Statistics], criterion: str, seed: int = 0
) -> dict[int, Tensor]:
    """Layer → energy of each state by a criterion, (N,).

    Raises:
        ValueError: an energy is not finite, or a layer has none at all.
    """
    layout, energies = layout_of(model), {}
    for index, mixer in state_layers(model).items():
        projection = full(mixer.get_parameter(layout.projection).detach())
        layer = LayerStates(
            statistics=statistics[index],
            B_rows=projection[projection_rows(mixer, layout, STATE_INPUT)],
            C_rows=projection[projection_rows(mixer, layout, STATE_OUTPUT)],
            generator=seeded_generator(seed, index),
        )
        energies[index] = CRITERIA[criterion](layer)
        if not torch.isfinite(energies[index]).all() or energies[index].sum() <= 0:
            raise ValueError(
                f"layer {index}: the state energies are not finite, or all zero. The model's activations overflow or "
                "its weights are degenerate; nothing was changed."
            )
    return energies


def masked_projection(mixer: nn.Module, layout: SelectiveLayout, selection: Selection) -> Tensor:
    """The projection at its full size with which the mixer computes what it will after the cut.

    Rows of B and C that make dropped states are zero, the kept rows of C are compensated.
    """
    projection = full(mixer.get_parameter(layout.projection).detach()).clone()
    output_rows = projection_rows(mixer, layout, STATE_OUTPUT)
    kept = compensated_output_rows(projection[output_rows], selection)
    dropped = complement(selection.keep, state_size(mixer, layout)).to(projection.device)
    for block in (STATE_INPUT, STATE_OUTPUT):
        projection[projection_rows(mixer, layout, block)][dropped] = 0
    projection[output_rows][selection.keep] = kept
    return projection
