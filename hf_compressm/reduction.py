"""The one API: `analyze` makes a plan and changes nothing, `compress` carries it out.

The callback, the scripts and any hand-written training loop all go through these two functions.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .calibration import Batch, predicted_tokens, take_batches, undisturbed
from .config import CompreSSMConfig
from .criteria import CRITERIA, LayerStates
from .engines import unwrap
from .hankel import truncation_rank
from .history import ReductionEvent
from .kernels import observed_scan, scan_installed
from .layouts import STATE_INPUT, STATE_OUTPUT, StateLayout, layout_of, projection_rows, state_layers, state_size
from .selective import Statistics, compensation, complement, layer_hankel_singular_values
from .surgery import Selection, check_state_tensors, compensated_output_rows, shrink_state

Plan = dict[int, Selection]


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
        model: a supported Transformers causal language model, any floating dtype (analysed in float32 at least).
        batches: dicts of tensors (`input_ids`, optional `attention_mask`, `labels`); the first
            `config.calibration_batches` are read. A DataLoader will do.
        config: what to keep.

    Raises:
        ValueError: an unsupported model, too little data, NaN or Inf anywhere, or a target above the present size.
    """
    started = time.perf_counter()
    model = unwrap(model)
    check_state_tensors(model)
    sizes = {index: state_size(mixer, layout_of(model)) for index, mixer in state_layers(model).items()}
    _check_target(config, max(sizes.values()))
    device = next(model.parameters()).device
    batches = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in take_batches(batches, config.calibration_batches)
    ]

    with undisturbed(model), scan_installed():
        statistics = collect_statistics(model, batches[0::2])
        energies = score_states(model, statistics, config)
        losses = _LossMeter(model, batches[1::2])
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
    model = unwrap(model)
    if report.applied:
        raise ValueError("this report has been applied already; call analyze again.")
    sizes = {index: state_size(mixer, layout_of(model)) for index, mixer in state_layers(model).items()}
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
        seconds=report.seconds,
        criterion=report.config.criterion,
        compensate=report.config.compensate,
        hankel_singular_values=[spectrum.cpu() for spectrum in report.hankel_singular_values.values()],
    )


def collect_statistics(model: nn.Module, batches: list[Batch]) -> dict[int, Statistics]:
    """Layer → `Statistics` over the batches, from forward passes of an unwrapped model in eval mode."""
    layout, mixers = layout_of(model), state_layers(model)
    statistics = {
        index: Statistics.empty(*mixer.get_parameter(layout.decay).shape, device=next(mixer.parameters()).device)
        for index, mixer in mixers.items()
    }
    weights = {
        i: m.get_parameter(layout.output_projection).detach().double().square().sum(0) for i, m in mixers.items()
    }
    running: list[int] = []  # the layer whose scan comes next
    handles = [
        mixer.register_forward_pre_hook(lambda module, args, index=index: running.append(index))
        for index, mixer in mixers.items()
    ]
    mask = None

    def observer(u, time_step, A, B, C, gate):
        index = running.pop()
        statistics[index].accumulate(u, time_step, A, B, C, gate, weights[index], mask)

    try:
        with observed_scan(observer):
            for batch in batches:
                mask = batch.get("attention_mask")
                _forward(model, batch, {})
    finally:
        for handle in handles:
            handle.remove()
    return statistics


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
            generator=torch.Generator().manual_seed(config.calibration_seed + index),
        )
        energies[index] = CRITERIA[config.criterion](layer)
        if not torch.isfinite(energies[index]).all() or energies[index].sum() <= 0:
            raise ValueError(
                f"layer {index}: the state energies are not finite, or all zero. The model's activations overflow or "
                "its weights are degenerate; nothing was changed."
            )
    return energies


def _check_target(config: CompreSSMConfig, size: int) -> None:
    if config.target_state_size is not None and config.target_state_size > size:
        raise ValueError(
            f"target_state_size = {config.target_state_size} is above the model's {size} states; give 1 … {size}."
        )


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


def _choose_size(plan, losses: "_LossMeter", energies: dict[int, Tensor], config: CompreSSMConfig, size: int) -> int:
    """The one state size for all layers that the configuration asks for, or `size` where the gate stays shut."""
    if config.target_state_size is not None:
        return config.target_state_size
    if config.loss_budget is not None:
        chosen = _smallest_within_budget(plan, losses, config, size)
    elif config.cut_fraction is not None:
        chosen = config.round_up(size * (1 - config.cut_fraction))
    else:
        spectra = [energy.sort(descending=True).values for energy in energies.values()]
        chosen = config.round_up(max(truncation_rank(spectrum, config.tolerance, 0.0) for spectrum in spectra))
    return chosen if chosen < (1 - config.min_reduction) * size else size


def _smallest_within_budget(plan, losses: "_LossMeter", config: CompreSSMConfig, size: int) -> int:
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


class _LossMeter:
    """Measures the loss of a model as a plan would leave it, by masks: dropped rows of B and C zero, C compensated."""

    def __init__(self, model: nn.Module, batches: list[Batch]):
        self.model, self.batches, self.seconds = model, batches, 0.0
        self.tokens = [predicted_tokens(batch) for batch in batches]
        self._measured: dict[tuple[int, ...], list[float]] = {}

    def of(self, plan: Plan) -> float:
        """Mean loss over all batches, nats per predicted token; plans of the same sizes are measured once."""
        losses = self._losses(plan)
        return sum(loss * count for loss, count in zip(losses, self.tokens, strict=True)) / sum(self.tokens)

    def change_by_one_layer(self, index: int, selection: Selection) -> float:
        """Change of the loss on the first batch when only this layer is cut."""
        return self._measure({index: selection}, self.batches[:1])[0] - self._losses({})[0]

    def _losses(self, plan: Plan) -> list[float]:
        key = tuple(len(selection.keep) for selection in plan.values())
        if key not in self._measured:
            self._measured[key] = self._measure(plan, self.batches)
        return self._measured[key]

    def _measure(self, plan: Plan, batches: list[Batch]) -> list[float]:
        """Mean loss of each batch, nats per predicted token."""
        started = time.perf_counter()
        masks = self._masked_projections(plan)
        losses = [_forward(self.model, batch, masks).loss.item() for batch in batches]
        self.seconds += time.perf_counter() - started
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError(
                "the loss on the calibration batches is NaN or Inf: training has diverged. Nothing was changed."
            )
        return losses

    def _masked_projections(self, plan: Plan) -> dict[str, Tensor]:
        layout, names = layout_of(self.model), {parameter: name for name, parameter in self.model.named_parameters()}
        masked = {}
        for index, mixer in state_layers(self.model).items():
            if index in plan and len(plan[index].keep) < state_size(mixer, layout):
                parameter = mixer.get_parameter(layout.projection)
                masked[names[parameter]] = masked_projection(mixer, layout, plan[index])
        return masked


def masked_projection(mixer: nn.Module, layout: StateLayout, selection: Selection) -> Tensor:
    """The projection at its full size with which the mixer computes what it will after the cut."""
    projection = mixer.get_parameter(layout.projection).detach().clone()
    dropped = complement(selection.keep, state_size(mixer, layout)).to(projection.device)
    for block in (STATE_INPUT, STATE_OUTPUT):
        projection[projection_rows(mixer, layout, block)][dropped] = 0
    kept_rows = projection_rows(mixer, layout, STATE_OUTPUT)
    projection[kept_rows][selection.keep] = compensated_output_rows(mixer, layout, selection)
    return projection


def _forward(model: nn.Module, batch: Batch, overrides: dict[str, Tensor]):
    """One forward pass with some parameters overridden; half-precision weights are taken in float32."""
    halves = {
        name: parameter.float()
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
    }
    overrides = halves | {name: value.float() if name in halves else value for name, value in overrides.items()}
    return functional_call(model, overrides, kwargs={**batch, "use_cache": False})
