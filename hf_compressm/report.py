"""What `analyze` found and proposes, and how it is shown."""

from dataclasses import dataclass, field

from torch import Tensor

from .analysis.recall import RecallResult, chance
from .config import CompreSSMConfig
from .theory.plan import Plan


@dataclass
class StateReport:
    """What `analyze` found and proposes; `print(report)` shows it as a table.

    Attributes:
        config: the configuration it answers.
        plan: layer → what becomes of it.
        state_sizes_before: layer → N when analysed.
        criterion: how states were ranked: the name of a score, or "hankel" for balanced truncation.
        compensate: whether kept states make up for dropped ones.
        scores: layer → score of each state, (N,): in stored order, or of the balanced states, descending.
        hankel_singular_values: layer → spectrum, (N,), descending; for a selective layer that of its surrogate
            Gramians, averaged over a sample of channels.
        loss_before, loss_after: nats per prediction, measured on held-out calibration batches: of the model, and of
            the model as the plan would leave it. None without batches.
        single_layer_loss_change: layer → nats per prediction, measured by cutting that layer alone, on a few held-out
            sequences. Their sum falls short of, or exceeds, the measured change where layers interact. Empty without
            batches.
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
        """Layer → kept states, sorted, (r,)."""
        return {index: entry.kept_states for index, entry in self.plan.items()}

    @property
    def state_sizes(self) -> dict[int, int]:
        """Layer → N as the plan would leave it."""
        return {index: len(keep) for index, keep in self.kept_states.items()}

    @property
    def is_cut(self) -> bool:
        """Whether the plan removes anything."""
        return self.state_sizes != self.state_sizes_before

    @property
    def is_refitted(self) -> bool:
        """Whether layers are refitted; where that did not help on held-out batches, they are not."""
        return any(entry.is_refitted for entry in self.plan.values())

    @property
    def score_discarded(self) -> dict[int, float]:
        """Layer → share of the state score that the plan drops."""
        shares = {}
        for index, keep in self.kept_states.items():
            score = self.scores[index]
            cut = len(keep) < len(score)
            shares[index] = float(1 - score[keep].sum() / score.sum().clamp_min(1e-300)) if cut else 0.0
        return shares

    def __str__(self) -> str:
        rows = ["layer  N before  N after  score discarded"]
        for index, before in self.state_sizes_before.items():
            rows.append(f"{index:5d}  {before:8d}  {self.state_sizes[index]:7d}  {self.score_discarded[index]:16.2%}")
        if self.loss_before is None:
            return "\n".join([*rows, *self._recall_rows()])
        changes = self.single_layer_loss_change.values()
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
