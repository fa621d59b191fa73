"""A rollback undoes a cut after which the evaluations are worse."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..engines import all_processes, from_first_process, raise_in_all_processes
from ..report import StateReport
from ..storage.history import History
from ..storage.records import ReductionEvent
from .schedule import CompreSSMSchedule
from .snapshot import Snapshot

logger = logging.get_logger(__name__)

FOLDER = "_rollback"  # in Trainer's output folder; what starts with _ is not pushed


@dataclass(frozen=True)
class RollbackRule:
    """A rule says which cut did harm, by the values of a metric in Trainer's log.

    A cut is watched for `patience` evaluations. In each the metric is compared with its last value before the cut.

    Attributes:
        metric: the name of the metric in the log.
        greater_is_better: whether a fall, rather than a rise, is harm.
        tolerance: the harm allowed, as a share of the value before the cut.
        patience: the number of evaluations after a cut in which it is watched.
    """

    metric: str
    greater_is_better: bool
    tolerance: float
    patience: int

    def baseline(self, step: int, history: History, log_history: list[dict]) -> float | None:
        """Return the metric's last value before the cut after `step`; None if there was no evaluation."""
        values = [value for at, value in self._evaluations(history, log_history) if at < step]
        return values[-1] if values else None

    def watched_cuts(self, history: History, log_history: list[dict]) -> list[ReductionEvent]:
        """Return the cuts with fewer than `patience` evaluations so far, in order."""
        standing = _standing(history)
        return [event for event in standing if self._evaluations_since(event, history, log_history) < self.patience]

    def harmful_cut(self, value: float, history: History, log_history: list[dict]) -> ReductionEvent | None:
        """Return the earliest watched cut beside whose baseline `value`, the newest, is too bad; None if none is."""
        for event in _standing(history):
            baseline = self.baseline(event.step, history, log_history)
            if self._evaluations_since(event, history, log_history) <= self.patience and baseline is not None:
                harm = baseline - value if self.greater_is_better else value - baseline
                if not harm <= self.tolerance * abs(baseline):  # a NaN is harm, too
                    return event
        return None

    def _evaluations_since(self, event: ReductionEvent, history: History, log_history: list[dict]) -> int:
        """Count the evaluations after the cut; one repeated at the start of a resumed run counts once."""
        return len({at for at, _ in self._evaluations(history, log_history) if at >= event.step})

    def _evaluations(self, history: History, log_history: list[dict]) -> list[tuple[int, float]]:
        """Return (step, value) of all evaluations, but for those of a model that was taken back."""
        undone = [(event.step, event.rolled_back_at) for event in history.events if event.rolled_back_at is not None]
        entries = [(entry["step"], float(entry[self.metric])) for entry in log_history if self.metric in entry]
        return [(at, value) for at, value in entries if not any(first <= at <= last for first, last in undone)]


@dataclass
class Rollback:
    """A rollback keeps a snapshot from before every watched cut, and takes model and optimizer back to it.

    Attributes:
        rule: the rule that says which cut did harm.
        folder: the folder where snapshots are kept; None for memory.
        companions: the models that follow the one that trains.
    """

    rule: RollbackRule
    folder: Path | None
    companions: Sequence[nn.Module]
    _snapshots: dict[int, Snapshot] = field(default_factory=dict)  # by the step of the cut

    def take_snapshot(
        self, state: TrainerState, history: History, model: nn.Module, optimizer, report: StateReport
    ) -> None:
        """Take a snapshot before the cut that the report plans.

        Raises:
            ValueError: no evaluation before the cut gave the metric to compare with.
        """
        step = state.global_step
        if self.rule.baseline(step, history, state.log_history) is None:
            seen = sorted({name for entry in state.log_history for name in entry if name.startswith("eval_")})
            raise ValueError(
                f"rollback_tolerance compares {self.rule.metric} with its value before the cut, but no evaluation "
                f"gave it; they gave {seen}. Set metric_for_best_model to one of these."
            )
        with raise_in_all_processes():
            mark = _mark(step, list(report.score_discarded.values()))
            self._snapshots[step] = Snapshot(model, optimizer, self._folder_of(step), self.companions, mark)

    def find_snapshots(self, history: History, log_history: list[dict]) -> None:
        """Find the snapshots that an earlier process left of cuts that are still watched."""
        for event in self.rule.watched_cuts(history, log_history):
            with raise_in_all_processes():
                folder = self._folder_of(event.step)
                mark = _mark(event.step, event.score_discarded)
                snapshot = Snapshot.found(folder, mark) if folder is not None else None
            if all_processes(snapshot is not None):
                self._snapshots[event.step] = snapshot

    def undo_harmful_cut(
        self, value: float, history: History, state: TrainerState, model: nn.Module, optimizer
    ) -> ReductionEvent | None:
        """Undo, after an evaluation, the earliest cut that did harm, and all later ones with it.

        Args:
            value: the metric in this evaluation.

        Returns:
            The earliest cut that was undone, or None where none was.
        """
        events, undone = history.events, None
        harmful = self.rule.harmful_cut(value, history, state.log_history)
        position = from_first_process(events.index(harmful) if harmful is not None else None)
        if position is not None and events[position].step in self._snapshots:
            undone = events[position]
            self._snapshots[undone.step].restore(model, optimizer, self.companions)
            for event in events[position:]:
                if event.rolled_back_at is None:
                    event.rolled_back_at = state.global_step
        elif position is not None:
            logger.warning(
                f"The cut after step {events[position].step} did harm, but cannot be undone: the run was resumed, and "
                "no snapshot of that cut was found. With rollback_storage='disk', in the same output_dir and with as "
                "many processes, there would be one."
            )
        if self.folder is None:
            self.discard_unwatched(history, state.log_history)
        return undone

    def discard_unwatched(self, history: History, log_history: list[dict]) -> None:
        """Free the snapshots of cuts that are no longer watched; on disk only once a checkpoint says so."""
        self._discard(self._snapshots.keys() - {event.step for event in self.rule.watched_cuts(history, log_history)})

    def discard_all(self) -> None:
        """Free every snapshot."""
        self._discard(set(self._snapshots))

    def _discard(self, steps: set[int]) -> None:
        for step in steps:
            self._snapshots.pop(step).discard()
        if self.folder is not None:
            with suppress(OSError):  # other snapshots are still there, or there was no folder
                self.folder.rmdir()

    def _folder_of(self, step: int) -> Path | None:
        return None if self.folder is None else self.folder / f"step-{step}"


def build_rollback(
    schedule: CompreSSMSchedule,
    args: TrainingArguments,
    state: TrainerState,
    history: History,
    event_steps: list[int],
    train_dataloader: DataLoader,
    companions: Sequence[nn.Module],
) -> Rollback | None:
    """Build the rollback that a schedule asks for, on the metric that chooses Trainer's best model.

    Args:
        event_steps: the steps after which cuts are due, ascending.
        train_dataloader: the loader by which Trainer counts its epochs.
        companions: the models that follow the one that trains.

    Returns:
        The rollback, or None where the schedule has no `rollback_tolerance`. Its metric is the loss unless Trainer
        names one.

    Raises:
        ValueError: nothing will be evaluated, or the first cut has no evaluation before it to be compared with.
    """
    if schedule.rollback_tolerance is None:
        return None
    if args.eval_strategy == IntervalStrategy.NO:
        raise ValueError("rollback_tolerance needs evaluations during training: set eval_strategy and eval_steps.")
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    better = bool(args.greater_is_better)
    rule = RollbackRule(f"eval_{metric}", better, schedule.rollback_tolerance, schedule.rollback_patience)
    first_cut = min((step for step in event_steps if step > state.global_step), default=None)
    first_evaluation = _first_evaluation_step(args, state, train_dataloader)
    has_baseline = first_cut is None or rule.baseline(first_cut, history, state.log_history) is not None
    if not has_baseline and first_evaluation >= first_cut:
        raise ValueError(
            f"rollback_tolerance compares with an evaluation before the cut, but the first cut is due after step "
            f"{first_cut} and the first evaluation after step {first_evaluation}: set eval_on_start=True, or "
            "evaluate earlier or cut later."
        )
    folder = Path(args.output_dir) / FOLDER if schedule.rollback_storage == "disk" else None
    return Rollback(rule, folder, companions)


def _first_evaluation_step(args: TrainingArguments, state: TrainerState, train_dataloader: DataLoader) -> int:
    """Return the step after which Trainer evaluates first in a run."""
    if args.eval_on_start:
        return 0
    by_steps = args.eval_strategy == IntervalStrategy.STEPS
    every = state.eval_steps if by_steps else _steps_per_epoch(args, state, train_dataloader)
    delay = args.eval_delay if by_steps else args.eval_delay * every
    return max(1, math.ceil(delay / every)) * every


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, train_dataloader: DataLoader) -> int:
    """Count the optimizer steps of an epoch; for a stream, whose end is not known, those of the whole run."""
    try:
        return max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
    except TypeError:
        return state.max_steps


def _mark(step: int, score_discarded: list[float]) -> str:
    """Return a mark that is the same for the same cut of the same run, and hardly for any other."""
    return f"{step} {score_discarded}"


def _standing(history: History) -> list[ReductionEvent]:
    return [event for event in history.events if event.is_cut and event.rolled_back_at is None]
