"""The safety net: a cut after which the evaluations are worse is undone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .config import CompreSSMSchedule
from .engines import everywhere, from_first_process, together
from .history import History, ReductionEvent
from .snapshot import Snapshot

logger = logging.get_logger(__name__)

FOLDER = "rollback"  # of the snapshots, within Trainer's output folder


@dataclass(frozen=True)
class Verdict:
    """Judges cuts by what Trainer's log says of a metric.

    A cut is on trial for `patience` evaluations. In each the metric is compared with its last value before the cut.

    Attributes:
        metric: its name in the log.
        greater_is_better: whether a fall, rather than a rise, is harm.
        tolerance: harm allowed, as a share of the value before the cut.
        patience: evaluations after a cut.
    """

    metric: str
    greater_is_better: bool
    tolerance: float
    patience: int

    def baseline(self, step: int, log_history: list[dict]) -> float | None:
        """The metric's last value before the cut after `step`; None where it was not evaluated before."""
        values = [value for at, value in self._evaluations(log_history) if at < step]
        return values[-1] if values else None

    def latest(self, log_history: list[dict]) -> float:
        """The metric's newest value."""
        return self._evaluations(log_history)[-1][1]

    def on_trial(self, events: list[ReductionEvent], log_history: list[dict]) -> list[ReductionEvent]:
        """The cuts still to be judged, in order."""
        return [event for event in _standing(events) if self._judged(event, log_history) < self.patience]

    def harmful_cut(self, events: list[ReductionEvent], log_history: list[dict]) -> ReductionEvent | None:
        """The earliest cut on trial beside whose baseline the newest evaluation is too bad."""
        value = self.latest(log_history)
        for event in _standing(events):
            baseline = self.baseline(event.step, log_history)
            if self._judged(event, log_history) <= self.patience and baseline is not None:
                harm = baseline - value if self.greater_is_better else value - baseline
                if not harm <= self.tolerance * abs(baseline):  # so is NaN
                    return event
        return None

    def _judged(self, event: ReductionEvent, log_history: list[dict]) -> int:
        return sum(at >= event.step for at, _ in self._evaluations(log_history))

    def _evaluations(self, log_history: list[dict]) -> list[tuple[int, float]]:
        return [(entry["step"], float(entry[self.metric])) for entry in log_history if self.metric in entry]


@dataclass
class SafetyNet:
    """Keeps a snapshot from before every cut that is on trial, and goes back to it.

    Attributes:
        verdict: which cut did harm.
        folder: where snapshots are kept; None for memory.
        companions: models that follow the one that trains.
    """

    verdict: Verdict
    folder: Path | None
    companions: Sequence[nn.Module]
    _snapshots: dict[int, Snapshot] = field(default_factory=dict)  # by the step of the cut

    def keep(self, step: int, model: nn.Module, optimizer) -> None:
        """Take a snapshot, before the cut after `step`."""
        with together():
            self._snapshots[step] = Snapshot(model, optimizer, self._folder_of(step), self.companions)

    def take_up(self, history: History, log_history: list[dict]) -> None:
        """Find the snapshots that an earlier process left of cuts still on trial."""
        for event in self.verdict.on_trial(history.events, log_history):
            folder = self._folder_of(event.step)
            snapshot = Snapshot.found(folder) if folder is not None else None
            if everywhere(snapshot is not None):
                self._snapshots[event.step] = snapshot

    def judge(self, history: History, state: TrainerState, model: nn.Module, optimizer) -> ReductionEvent | None:
        """After an evaluation: undo the earliest cut that did harm, and all later ones with it.

        Returns:
            The earliest cut that was undone; None if all stand.
        """
        events = history.events
        harmful = self.verdict.harmful_cut(events, state.log_history)
        position = from_first_process(events.index(harmful) if harmful is not None else None)
        undone = None
        if position is not None and events[position].step in self._snapshots:
            undone = events[position]
            self._snapshots[undone.step].restore(model, optimizer, self.companions)
            for event in events[position:]:
                event.rolled_back_at = state.global_step
        elif position is not None:
            logger.warning(
                f"The cut after step {events[position].step} did harm, but cannot be undone: the run was resumed, and "
                "its snapshot did not outlive the process (rollback_storage='disk' would have)."
            )
        on_trial = {event.step for event in self.verdict.on_trial(events, state.log_history)}
        self._discard(self._snapshots.keys() - on_trial)
        return undone

    def discard_all(self) -> None:
        """Free every snapshot."""
        self._discard(set(self._snapshots))

    def _discard(self, steps: set[int]) -> None:
        for step in steps:
            self._snapshots.pop(step).discard()

    def _folder_of(self, step: int) -> Path | None:
        return None if self.folder is None else self.folder / f"step-{step}"


def spread_safety_net(
    schedule: CompreSSMSchedule,
    args: TrainingArguments,
    state: TrainerState,
    event_steps: list[int],
    companions: Sequence[nn.Module],
) -> SafetyNet | None:
    """The net that a schedule asks for, on the metric that Trainer is told to go by, the loss by default.

    Raises:
        ValueError: nothing will be evaluated, or the first cut has no evaluation before it to be compared with.
    """
    if schedule.rollback_tolerance is None:
        return None
    if args.eval_strategy == IntervalStrategy.NO:
        raise ValueError("rollback_tolerance needs evaluations during training: set eval_strategy and eval_steps.")
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    better = bool(args.greater_is_better)
    verdict = Verdict(f"eval_{metric}", better, schedule.rollback_tolerance, schedule.rollback_patience)
    first_cut = min((step for step in event_steps if step > state.global_step), default=None)
    first_evaluation = _first_evaluation_step(args, state)
    has_baseline = first_cut is None or verdict.baseline(first_cut, state.log_history) is not None
    if not has_baseline and first_evaluation >= first_cut:
        raise ValueError(
            f"rollback_tolerance compares with an evaluation before the cut, but the first cut is due after step "
            f"{first_cut} and the first evaluation after step {first_evaluation}: set eval_on_start=True, or "
            "evaluate earlier or cut later."
        )
    folder = Path(args.output_dir) / FOLDER if schedule.rollback_storage == "disk" else None
    return SafetyNet(verdict, folder, companions)


def _first_evaluation_step(args: TrainingArguments, state: TrainerState) -> int:
    """The step after which Trainer evaluates first in a run."""
    if args.eval_on_start:
        return 0
    if args.eval_strategy == IntervalStrategy.STEPS:
        every, delay = state.eval_steps, args.eval_delay
    else:
        every = state.max_steps / max(state.num_train_epochs, 1)
        delay = args.eval_delay * every
    return math.ceil(max(1, math.ceil(delay / every)) * every)


def _standing(events: list[ReductionEvent]) -> list[ReductionEvent]:
    return [event for event in events if event.is_cut and event.rolled_back_at is None]
