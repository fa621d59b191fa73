"""The safety net: which cut hurt, by the evaluations before and after it."""

import math
from dataclasses import dataclass

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .config import CompreSSMSchedule
from .history import ReductionEvent


@dataclass(frozen=True)
class SafetyNet:
    """Judges cuts by a metric that Trainer logs.

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

    def on_trial(self, events: list[ReductionEvent], log_history: list[dict]) -> list[ReductionEvent]:
        """The cuts still to be judged, in order."""
        return [event for event in _standing(events) if self._judged(event, log_history) < self.patience]

    def harmful_cut(self, events: list[ReductionEvent], log_history: list[dict]) -> ReductionEvent | None:
        """The earliest cut on trial beside whose baseline the newest evaluation is too bad; all later go with it."""
        value = self.latest(log_history)
        for event in _standing(events):
            baseline = self.baseline(event.step, log_history)
            if self._judged(event, log_history) <= self.patience and baseline is not None:
                harm = baseline - value if self.greater_is_better else value - baseline
                if not harm <= self.tolerance * abs(baseline):  # so is NaN
                    return event
        return None

    def latest(self, log_history: list[dict]) -> float:
        """The metric's newest value."""
        return self._evaluations(log_history)[-1][1]

    def _judged(self, event: ReductionEvent, log_history: list[dict]) -> int:
        return sum(at >= event.step for at, _ in self._evaluations(log_history))

    def _evaluations(self, log_history: list[dict]) -> list[tuple[int, float]]:
        return [(entry["step"], float(entry[self.metric])) for entry in log_history if self.metric in entry]


def _standing(events: list[ReductionEvent]) -> list[ReductionEvent]:
    return [event for event in events if event.is_cut and event.rolled_back_at is None]


def safety_net_for(schedule: CompreSSMSchedule, args: TrainingArguments) -> SafetyNet:
    """The net that a schedule asks for, on the metric that Trainer is told to go by, the loss by default.

    Raises:
        ValueError: nothing will be evaluated.
    """
    if args.eval_strategy == IntervalStrategy.NO:
        raise ValueError("rollback_tolerance needs evaluations during training: set eval_strategy and eval_steps.")
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    return SafetyNet(
        f"eval_{metric}", bool(args.greater_is_better), schedule.rollback_tolerance, schedule.rollback_patience
    )


def first_evaluation_step(args: TrainingArguments, state: TrainerState) -> int:
    """The step after which Trainer evaluates first in a run."""
    if args.eval_on_start:
        return 0
    if args.eval_strategy == IntervalStrategy.STEPS:
        every, delay = state.eval_steps, args.eval_delay
    else:
        every = state.max_steps / max(state.num_train_epochs, 1)
        delay = args.eval_delay * every
    return math.ceil(max(1, math.ceil(delay / every)) * every)
