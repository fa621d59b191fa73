"""The one API: `analyze` makes a plan and changes nothing, `compress` carries it out.

The callback, the scripts and any hand-written training loop all go through these two functions.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor, nn

from .allocation import choose_sizes
from .analysis import allocation_of, analyze_states, calibration_batches, check_config
from .calibration import undisturbed
from .config import CompreSSMConfig
from .engines import from_first_process, together, unwrap
from .kernels import scan_installed
from .layouts import state_sizes
from .measurement import LossMeter
from .recall import RecallProbe, RecallResult, chance
from .records import ReductionEvent
from .resizing import check_state_tensors
from .surgery import Plan, Selection, plan_fingerprint, shrink_state


@dataclass
class StateReport:
    """What `analyze` found and proposes; `print(report)` shows it as a table.

    Attributes:
        config: the configuration it answers.
        plan: layer → what becomes of it.
        state_sizes_before: layer → N when analysed.
        criterion: how states were ranked: the name of a score, or "hankel" for balanced truncation.
        compensate: whether kept states make up for dropped ones.
        energies: layer → energy of each state, (N,): in stored order, or of the balanced states, descending.
        hankel_singular_values: layer → spectrum, (N,), descending; for a selective layer that of its surrogate
            Gramians, averaged over a sample of channels.
        loss_before, loss_after: nats per prediction, measured on held-out calibration batches: of the model, and of
            the model as the plan would leave it. None without batches.
        predicted_loss_change: layer → nats per prediction, by cutting that layer alone, on a few held-out sequences.
            Their sum falls short of, or exceeds, the measured change where layers interact. Empty without batches.
        recall_before, recall_after: how well it recalls pairs of tokens, as the losses; None unless
            `config.recall_pairs` asks for it.
        tokens: calibration tokens behind the statistics.
        seconds: time of the analysis; `measuring_seconds` of it went into measuring losses.
        applied: set by `compress`; a report is applied once.
    """

    config: CompreSSMConfig
    plan: Plan
    state_sizes_before: dict[int, int]
    criterion: str
    compensate: bool
    energies: dict[int, Tensor]
    hankel_singular_values: dict[int, Tensor]
    loss_before: float | None
    loss_after: float | None
    predicted_loss_change: dict[int, float]
    tokens: int
    seconds: float
    measuring_seconds: float
    recall_before: RecallResult | None = None
    recall_after: RecallResult | None = None
    applied: bool = field(default=False)

    @property
    def keep(self) -> dict[int, Tensor]:
        """Layer → kept states, sorted, (r,)."""
        return {index: entry.keep for index, entry in self.plan.items()}

    @property
    def state_sizes(self) -> dict[int, int]:
        """Layer → N as the plan would leave it."""
        return {index: len(keep) for index, keep in self.keep.items()}

    @property
    def is_cut(self) -> bool:
        """Whether the plan removes anything."""
        return self.state_sizes != self.state_sizes_before

    @property
    def is_refitted(self) -> bool:
        """Whether layers are refitted; where that did not help on held-out batches, they are not."""
        return any(isinstance(entry, Selection) and entry.refit is not None for entry in self.plan.values())

    @property
    def energy_discarded(self) -> dict[int, float]:
        """Layer → share of the state energy that the plan drops."""
        shares = {}
        for index, keep in self.keep.items():
            energy = self.energies[index]
            cut = len(keep) < len(energy)
            shares[index] = float(1 - energy[keep].sum() / energy.sum().clamp_min(1e-300)) if cut else 0.0
        return shares

    def __str__(self) -> str:
        rows = ["layer  N before  N after  energy discarded"]
        for index, before in self.state_sizes_before.items():
            rows.append(f"{index:5d}  {before:8d}  {self.state_sizes[index]:7d}  {self.energy_discarded[index]:16.2%}")
        if self.loss_before is None:
            return "\n".join([*rows, *self._recall_rows()])
        changes = self.predicted_loss_change.values()
        rows[0] += "  predicted loss change"
        rows[1:] = [f"{row}  {change:+16.4f} nats" for row, change in zip(rows[1:], changes, strict=True)]
        rows.append(
            f"measured loss: {self.loss_before:.4f} → {self.loss_after:.4f} nats per prediction "
            f"({self.loss_after - self.loss_before:+.4f}; the layers alone predict {sum(changes):+.4f})"
        )
        if self.config.refit and self.is_cut:
            rows.append("refitted" if self.is_refitted else "not refitted: it did not help on held-out batches")
        return "\n".join([*rows, *self._recall_rows()])

    def _recall_rows(self) -> list[str]:
        if self.recall_before is None:
            return []
        before, after, pairs = self.recall_before, self.recall_after, self.config.recall_pairs
        by_chance = chance(pairs)
        return [
            f"recall of {pairs} pairs: {before.loss:.4f} → {after.loss:.4f} nats per value, {before.accuracy:.1%} → "
            f"{after.accuracy:.1%} right (by chance {by_chance.loss:.4f}, {by_chance.accuracy:.1%})"
        ]


def analyze(model: nn.Module, batches: Iterable[dict] | None, config: CompreSSMConfig) -> StateReport:
    """Measure what each state does and plan which to keep. Nothing is changed: not the weights, the mode, nor any RNG.

    A Mamba is analysed on data: every other calibration batch feeds the statistics, losses are measured on the rest.
    With a refit it is one batch in three for statistics and the fit, one to judge it by, one for losses.
    An LRU is analysed from its weights; batches, where given, all serve to measure losses. Of several processes each
    calls this with batches of its own: statistics and losses are taken over all of them, and the plan is one.

    Args:
        model: a supported Transformers model, any floating dtype. Weights are taken in float32 at least; forward
            passes run as the model's own do, so in autocast inside Trainer(bf16=True).
        batches: dicts of tensors (`input_ids` or `input_values`, optional `attention_mask`, `labels`); the first
            `config.calibration_batches` are read. A DataLoader will do. None for an LRU whose losses are not asked.
        config: what to keep.

    Raises:
        ValueError: an unsupported model, a configuration that does not fit it, too little data, NaN or Inf anywhere,
            or a target above the present size.
    """
    started = time.perf_counter()
    model, config_of_first = unwrap(model), from_first_process(config.to_dict())
    with together():
        if config.to_dict() != config_of_first:
            raise ValueError(
                f"the processes were given different configurations: {config_of_first} and {config.to_dict()}."
            )
        check_state_tensors(model)
        check_config(config, model)
        sizes = state_sizes(model)
        statistics_batches, held_out, loss_batches = calibration_batches(model, batches, config)
        if config.loss_budget is not None and not loss_batches:
            raise ValueError("batches = None; a loss budget needs batches to measure losses on.")

    with undisturbed(model), scan_installed():
        analysis = analyze_states(model, statistics_batches, config, held_out)
        losses = LossMeter(model, loss_batches, analysis.overrides) if loss_batches else None
        allocation = allocation_of(config, model)
        chosen = choose_sizes(
            config,
            analysis.energies,
            allocation,
            loss_of=lambda some: losses.of(analysis.plan(sizes | some)),
            errors=analysis.squared_errors() if allocation == "global" else None,
        )
        plan = from_first_process({index: entry.cpu() for index, entry in analysis.plan(chosen).items()})
        spectra = analysis.hankel_singular_values()
        recall = RecallProbe(model, config.recall_pairs, analysis.overrides) if config.recall_pairs else None
        loss_before = losses.of({}) if losses else None
        loss_after = losses.of(plan) if losses else None
        recall_before, recall_after = (recall.of({}), recall.of(plan)) if recall else (None, None)
        predicted = {index: losses.change_by_one_layer(index, plan) for index in plan} if losses else {}

    return StateReport(
        config=config,
        plan=plan,
        state_sizes_before=sizes,
        criterion=analysis.criterion,
        compensate=analysis.compensate,
        energies=analysis.energies,
        hankel_singular_values=spectra,
        loss_before=loss_before,
        loss_after=loss_after,
        predicted_loss_change=predicted,
        recall_before=recall_before,
        recall_after=recall_after,
        tokens=analysis.tokens,
        seconds=time.perf_counter() - started,
        measuring_seconds=losses.seconds if losses else 0.0,
    )


def compress(
    model: nn.Module,
    report: StateReport,
    optimizer=None,
    step: int | None = None,
    companions: Sequence[nn.Module] = (),
) -> ReductionEvent:
    """Carry out the plan of `analyze` in place, all of it or none.

    Args:
        model: the model that was analysed, unchanged in size since.
        report: the plan; it can be applied once.
        optimizer: the optimizer that trains the model, if one does; its state follows.
        step: optimizer steps done so far, for the record.
        companions: models of the same shape that follow, such as a `torch.optim.swa_utils.AveragedModel` of this one.

    Returns:
        The entry for the history.

    Raises:
        ValueError: the report was applied before or was made for other sizes; anything `shrink_state` refuses.
    """
    started = time.perf_counter()
    sizes, fingerprint = state_sizes(unwrap(model)), from_first_process(plan_fingerprint(report.plan))
    with together():
        if report.applied:
            raise ValueError("this report has been applied already; call analyze again.")
        if sizes != report.state_sizes_before:
            raise ValueError(
                f"the report was made for state sizes {report.state_sizes_before}, the model has {sizes}; "
                "call analyze again."
            )
        if plan_fingerprint(report.plan) != fingerprint:
            raise ValueError("this process was given another plan than the first; let all call analyze together.")
    if report.is_cut:
        shrink_state(model, report.plan, optimizer, companions)
    report.applied = True
    return ReductionEvent(
        step=step,
        state_sizes_before=list(sizes.values()),
        state_sizes_after=list(report.state_sizes.values()),
        keep=[keep.tolist() for keep in report.keep.values()],
        energy_discarded=list(report.energy_discarded.values()),
        predicted_loss_change=list(report.predicted_loss_change.values()) or None,
        loss_before=report.loss_before,
        loss_after=report.loss_after,
        tokens=report.tokens,
        seconds=report.seconds + time.perf_counter() - started,
        measuring_seconds=report.measuring_seconds,
        criterion=report.criterion,
        compensate=report.compensate,
        refit=report.is_refitted,
        hankel_singular_values=[spectrum.cpu() for spectrum in report.hankel_singular_values.values()],
        goal=report.config.goal,
        recall_before=report.recall_before and asdict(report.recall_before),
        recall_after=report.recall_after and asdict(report.recall_after),
    )
