"""A report holds what `analyze` found and proposes; reports and cuts are shown as text and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .analysis.recall import RecallResult, chance
from .config import CompreSSMConfig
from .storage.records import ReductionEvent, sizes_text
from .theory.plan import Plan

LOSS_UNIT = "nats per prediction"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """A table has headings and rows of cells, and is rendered here only."""

    headings: list[str]
    rows: list[list[str]]

    def as_text(self) -> str:
        """Return lines with the cells of a column flush right."""
        lines = [self.headings, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)

    def as_markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [f"| {' | '.join(line)} |" for line in (self.headings, *self.rows)]
        lines.insert(1, "|---" * len(self.headings) + "|")
        return "\n".join(lines)


@dataclass
class StateReport:
    """A report holds what `analyze` found and proposes; `print(report)` shows it as a table.

    Attributes:
        config: the configuration it answers.
        plan: layer → the entry that says what becomes of it.
        state_sizes_before: layer → N when it was analysed.
        criterion: how states were ranked: the name of a score, or "hankel" for balanced truncation.
        compensate: whether kept states make up for dropped ones.
        scores: layer → score of each state, (N,): in stored order, or of the balanced states, descending; in an
            axis-aligned layer with groups of heads (G, N).
        hankel_singular_values: layer → spectrum, (N,), descending; for a Mamba-1 layer that of its surrogate
            Gramians, averaged over a sample of channels.
        loss_before, loss_after: nats per prediction, measured on held-out calibration batches: of the model, and of
            the model as the plan would leave it. None without batches.
        single_layer_loss_change: layer → nats per prediction, measured by cutting that layer alone, on a few held-out
            sequences. Their sum falls short of, or exceeds, the measured change where layers interact. Empty without
            batches.
        recall_before, recall_after: how well the model recalls pairs of tokens before and after; None unless
            `config.recall_pairs` asks for it.
        tokens: calibration tokens behind the statistics.
        seconds: time of the analysis; `measuring_seconds` of it was used to measure losses.
        applied: whether `compress` has applied it; a report is applied once.
    """

    config: CompreSSMConfig
    plan: Plan
    state_sizes_before: dict[int, int]
    criterion: str
    compensate: bool
    scores: dict[int, Tensor]
    hankel_singular_values: dict[int, Tensor]
    loss_before: float | None
    loss_after: float | None
    single_layer_loss_change: dict[int, float]
    tokens: int
    seconds: float
    measuring_seconds: float
    recall_before: RecallResult | None = None
    recall_after: RecallResult | None = None
    applied: bool = field(default=False)

    @property
    def kept_states(self) -> dict[int, Tensor]:
        """Return layer → kept states, sorted, (r,), or in a layer with groups of heads (G, r)."""
        return {index: entry.kept_states for index, entry in self.plan.items()}

    @property
    def state_sizes(self) -> dict[int, int]:
        """Return layer → N as the plan would leave it."""
        return {index: entry.size for index, entry in self.plan.items()}

    @property
    def is_cut(self) -> bool:
        """Return whether the plan removes anything."""
        return self.state_sizes != self.state_sizes_before

    @property
    def is_refitted(self) -> bool:
        """Return whether layers are refitted; they are not where that did not help on held-out batches."""
        return any(entry.is_refitted for entry in self.plan.values())

    @property
    def score_discarded(self) -> dict[int, float]:
        """Return layer → share of the state score that the plan drops, in [0, 1]."""
        shares = {}
        for index, entry in self.plan.items():
            score, keep = self.scores[index], entry.kept_states
            kept = score.gather(-1, keep.to(score.device)).sum()
            is_cut = entry.size < score.shape[-1]
            shares[index] = float(1 - kept / score.sum().clamp_min(1e-300)) if is_cut else 0.0
        return shares

    @property
    def table(self) -> Table:
        """Return the table of the layers: sizes, score discarded, and the single-layer loss change if measured."""
        rows = [
            [str(index), str(before), str(self.state_sizes[index]), f"{self.score_discarded[index]:.2%}"]
            for index, before in self.state_sizes_before.items()
        ]
        headings = ["layer", "N before", "N after", "score discarded"]
        if self.loss_before is not None:
            headings.append("single-layer loss change")
            for row, index in zip(rows, self.state_sizes_before, strict=True):
                row.append(f"{self.single_layer_loss_change[index]:+.4f} nats")
        return Table(headings, rows)

    def __str__(self) -> str:
        lines = [self.table.as_text()]
        if self.loss_before is not None:
            lines.append(
                f"measured loss: {losses_text(self.loss_before, self.loss_after)} {LOSS_UNIT} "
                f"({self.loss_after - self.loss_before:+.4f}; the single-layer changes add up to "
                f"{sum(self.single_layer_loss_change.values()):+.4f})"
            )
            if self.config.refit and self.is_cut:
                lines.append("refitted" if self.is_refitted else "not refitted: it did not help on held-out batches")
        if self.recall_before is not None:
            lines.append(self._recall_line())
        return "\n".join(lines)

    def _recall_line(self) -> str:
        before, after, pairs = self.recall_before, self.recall_after, self.config.recall_pairs
        by_chance = chance(pairs)
        return (
            f"recall of {pairs} pairs: {losses_text(before.loss, after.loss)} nats per value, {before.accuracy:.1%} → "
            f"{after.accuracy:.1%} right (by chance {by_chance.loss:.4f}, {by_chance.accuracy:.1%})"
        )


def cuts_table(cuts: Sequence[ReductionEvent]) -> Table:
    """Return the table of cuts: step, sizes, score discarded, losses, and recall where it was measured.

    The score discarded is that of the layer which lost most.
    """
    headings = ["step", "N", "score discarded", f"loss before → after, {LOSS_UNIT}"]
    rows = [
        [
            "after training" if cut.step is None else str(cut.step),
            f"{sizes_text(cut.state_sizes_before)} → {sizes_text(cut.state_sizes_after)}",
            f"{max(cut.score_discarded):.1%}",
            losses_text(cut.loss_before, cut.loss_after),
        ]
        for cut in cuts
    ]
    if any(cut.recall_before is not None for cut in cuts):
        headings.append("recall of random pairs, nats per value (accuracy)")
        for row, cut in zip(rows, cuts, strict=True):
            row.append(_recall_text(cut))
    return Table(headings, rows)


def loss_text(loss: float) -> str:
    """Return the text of a loss as it is shown everywhere, without its unit."""
    return f"{loss:.4f}"


def losses_text(before: float | None, after: float | None) -> str:
    """Return the text of the losses before and after a cut, without their unit, or that they were not measured."""
    return NOT_MEASURED if before is None else f"{loss_text(before)} → {loss_text(after)}"


def _recall_text(cut: ReductionEvent) -> str:
    if cut.recall_before is None:
        return NOT_MEASURED
    return " → ".join(
        f"{recall['loss']:.3f} ({recall['accuracy']:.0%})" for recall in (cut.recall_before, cut.recall_after)
    )
