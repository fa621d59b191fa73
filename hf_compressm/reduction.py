"""The one API: `analyze` makes a plan and changes nothing, `compress` carries it out.

The callback, the scripts and any hand-written training loop all go through these two functions.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .calibration import take_batches, undisturbed
from .config import CompreSSMConfig
from .criteria import CRITERIA, LayerStates
from .engines import unwrap
from .hankel import truncation_rank
from .history import ReductionEvent
from .kernels import scan_installed
from .layouts import STATE_INPUT, STATE_OUTPUT, layout_of, projection_rows, state_layers, state_sizes
from .measurement import LossMeter, Plan, collect_statistics
from .selective import Statistics, compensation, layer_hankel_singular_values
from .surgery import Selection, check_state_tensors, shrink_state


@dataclass
class StateReport:
    """What `analyze` found and proposes; `print(report)` shows it as a table.

    Attributes:
        config: the configuration it answers.
        selections: layer → what is kept, with the compensation.
        state_sizes_before: layer → N when analysed.
        energies: layer → energy of each state, in stored order, (N,).
        hankel_singular_values: layer → spectrum, (N,), descending: σ of the surrogate Gramians, averaged over a sample
            of channels.
        loss_before, loss_after: nats per token, measured on held-out calibration batches: of the model, and of the
            model as the plan would leave it.
        predicted_loss_change: layer → nats per token, by cutting that layer alone, on one held-out batch. Their sum
            falls short of, or exceeds, the measured change where layers interact.
        tokens: calibration tokens behind the statistics.
        seconds: time of the analysis; `measuring_seconds` of it went into measuring losses.
        applied: set by `compress`; a report is applied once.
    """

    config: CompreSSMConfig
    selections: Plan
    state_sizes_before: dict[int, int]
    energies: dict[int, Tensor]
    hankel_singular_values: dict[int, Tensor]
    loss_before: float
    loss_after: float
    predicted_loss_change: dict[int, float]
    tokens: int
    seconds: float
    measuring_seconds: float
    applied: bool = field(default=False)

    @property
    def keep(self) -> dict[int, Tensor]:
        """Layer → kept states, sorted, (r,)."""
        return {index: selection.keep for index, selection in self.selections.items()}

    @property
    def state_sizes(self) -> dict[int, int]:
        """Layer → N as the plan would leave it."""
        return {index: len(keep) for index, keep in self.keep.items()}

    @property
    def is_cut(self) -> bool:
        """Whether the plan removes anything."""
        return self.state_sizes != self.state_sizes_before

    @property
    def energy_discarded(self) -> dict[int, float]:
        """Layer → share of the state energy that the plan drops."""
        return {
            index: float(1 - self.energies[index][keep].sum() / self.energies[index].sum())
            if self._cuts(index)
            else 0.0
            for index, keep in self.keep.items()
        }

    def _cuts(self, index: int) -> bool:
        return len(self.keep[index]) < self.state_sizes_before[index]

    def __str__(self) -> str:
        rows = ["layer  N before  N after  energy discarded  predicted loss change"]
        for index, before in self.state_sizes_before.items():
            rows.append(
                f"{index:5d}  {before:8d}  {self.state_sizes[index]:7d}  {self.energy_discarded[index]:15.2%}"
                f"  {self.predicted_loss_change[index]:+16.4f} nats"
            )
        rows.append(
            f"measured loss: {self.loss_before:.4f} → {self.loss_after:.4f} nats per token "
            f"({self.loss_after - self.loss_before:+.4f}; the layers alone predict "
            f"{sum(self.predicted_loss_change.values()):+.4f})"
        )
        return "\n".join(rows)


def analyze(model: nn.Module, batches: Iterable[dict], config: CompreSSMConfig) -> StateReport:
    """Measure what each state does and plan which to keep. Nothing is changed: not the weights, the mode, nor any RNG.

    Every other calibration batch feeds the statistics; losses are measured on the rest.

    Args:
        model: a supported Transformers causal language model, any floating dtype. Weights are taken in float32 at
            least; forward passes run as the model's own do, so in autocast inside Trainer(bf16=True).
        batches: dicts of tensors (`input_ids`, optional `attention_mask`, `labels`); the first
            `config.calibration_batches` are read. A DataLoader will do.
        config: what to keep.

    Raises:
        ValueError: an unsupported model, too little data, NaN or Inf anywhere, or a target above the present size.
    """
    started = time.perf_counter()
    model = unwrap(model)
    check_state_tensors(model)
    sizes = state_sizes(model)
    config.check_target(max(sizes.values()))
    device = next(model.parameters()).device
    batches = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in take_batches(batches, config.calibration_batches)
    ]

    with undisturbed(model), scan_installed():
        statistics = collect_statistics(model, batches[0::2])
        energies = score_states(model, statistics, config)
        losses = LossMeter(model, batches[1::2])
        plan = partial(_plan, energies, statistics, compensate=config.compensate)
        selections = plan(_choose_size(plan, losses, energies, config, max(sizes.values())))
        spectra = {i: layer_hankel_singular_values(s, _spectrum_of(config)) for i, s in statistics.items()}
        loss_before, loss_after = losses.of({}), losses.of(selections)
        predicted = {index: losses.change_by_one_layer(index, selection) for index, selection in selections.items()}

    return StateReport(
        config=config,
        selections=selections,
        state_sizes_before=sizes,
        energies=energies,
        hankel_singular_values=spectra,
        loss_before=loss_before,
        loss_after=loss_after,
        predicted_loss_change=predicted,
        tokens=int(next(iter(statistics.values())).tokens),
        seconds=time.perf_counter() - started,
        measuring_seconds=losses.seconds,
    )


def compress(model: nn.Module, report: StateReport, optimizer=None, step: int | None = None) -> ReductionEvent:
    """Carry out the plan of `analyze` in place, all of it or none.

    Args:
        model: the model that was analysed, unchanged in size since.
        report: the plan; it can be applied once.
        optimizer: the optimizer that trains the model, if one does; its state follows.
        step: optimizer steps done so far, for the record.

    Returns:
        The entry for the history.

    Raises:
        ValueError: the report was applied before or was made for other sizes; anything `shrink_state` refuses.
    """
    started = time.perf_counter()
    model = unwrap(model)
    if report.applied:
        raise ValueError("this report has been applied already; call analyze again.")
    sizes = state_sizes(model)
    if sizes != report.state_sizes_before:
        raise ValueError(
            f"the report was made for state sizes {report.state_sizes_before}, the model has {sizes}; "
            "call analyze again."
        )
    if report.is_cut:
        shrink_state(model, report.selections, optimizer)
    report.applied = True
    return ReductionEvent(
        step=step,
        state_sizes_before=list(sizes.values()),
        state_sizes_after=list(report.state_sizes.values()),
        keep=[keep.tolist() for keep in report.keep.values()],
        energy_discarded=list(report.energy_discarded.values()),
        predicted_loss_change=list(report.predicted_loss_change.values()),
        loss_before=report.loss_before,
        loss_after=report.loss_after,
        tokens=report.tokens,
        seconds=report.seconds + time.perf_counter() - started,
        measuring_seconds=report.measuring_seconds,
        criterion=report.config.criterion,
        compensate=report.config.compensate,
        hankel_singular_values=[spectrum.cpu() for spectrum in report.hankel_singular_values.values()],
    )


def score_states(model: nn.Module, statistics: dict[int, Statistics], config: CompreSSMConfig) -> dict[int, Tensor]:
    """Layer → energy of each state by the configured criterion, (N,).

    Raises:
        ValueError: an energy is not finite, or a layer has none at all.
    """
    layout, energies = layout_of(model), {}
    for index, mixer in state_layers(model).items():
        projection = mixer.get_parameter(layout.projection).detach()
        layer = LayerStates(
            statistics=statistics[index],
            B_rows=projection[projection_rows(mixer, layout, STATE_INPUT)],
            C_rows=projection[projection_rows(mixer, layout, STATE_OUTPUT)],
            generator=torch.Generator().manual_seed(config.calibration_seed * 1_000_003 + index),
        )
        energies[index] = CRITERIA[config.criterion](layer)
        if not torch.isfinite(energies[index]).all() or energies[index].sum() <= 0:
            raise ValueError(
                f"layer {index}: the state energies are not finite, or all zero. The model's activations overflow or "
                "its weights are degenerate; nothing was changed."
            )
    return energies


def _spectrum_of(config: CompreSSMConfig) -> str:
    return "mean" if config.criterion == "mean" else "second_moment"


def _plan(energies: dict[int, Tensor], statistics: dict[int, Statistics], size: int, compensate: bool) -> Plan:
    """Keep the `size` states of most energy in every layer."""
    plan = {}
    for index, energy in energies.items():
        keep = energy.topk(size).indices.sort().values
        covariance = statistics[index].gated_covariance
        plan[index] = Selection(keep, compensation(covariance, keep) if compensate and size < len(energy) else None)
    return plan


def _choose_size(plan, losses: LossMeter, energies: dict[int, Tensor], config: CompreSSMConfig, size: int) -> int:
    """The one state size for all layers that the configuration asks for, or `size` where the gate stays shut."""
    if config.target_state_size is not None:
        return config.target_state_size
    if config.loss_budget is not None:
        chosen = _smallest_within_budget(plan, losses, config, size)
    elif config.cut_fraction is not None:
        return min(size, config.round_up(size * (1 - config.cut_fraction)))
    else:
        spectra = [energy.sort(descending=True).values for energy in energies.values()]
        chosen = config.round_up(max(truncation_rank(spectrum, config.tolerance, 0.0) for spectrum in spectra))
    return chosen if chosen < (1 - config.min_reduction) * size else size


def _smallest_within_budget(plan, losses: LossMeter, config: CompreSSMConfig, size: int) -> int:
    """A size whose measured loss keeps the budget while the next smaller one breaks it (bisection), or the floor."""
    allowed = losses.of({}) + config.loss_budget
    candidates = [*range(config.round_up(1), size, config.multiple_of), size]  # the last is the model as it is
    breaks, keeps = -1, len(candidates) - 1
    while keeps - breaks > 1:
        middle = (breaks + keeps) // 2
        if losses.of(plan(candidates[middle])) <= allowed:
            keeps = middle
        else:
            breaks = middle
    return candidates[keeps]
