"""A schedule says when to cut; all its checks happen when it is built."""

import math
from dataclasses import dataclass
from fractions import Fraction

from ..config import is_count, option, require

ROLLBACK_STORAGES = ("memory", "disk")
ON_ROLLBACK = ("stop", "halve")
TRIGGERS = ("fixed", "settled")
EVENTS = {"fixed": 4, "settled": 1}  # by default the paper's four, and each layer once


@dataclass
class CompreSSMSchedule:
    """A schedule cuts `events` times in the window (`start`, `end`] of a run, or each layer when it has settled.

    The `events` cuts are equidistant, the last at the end of the window. The default is the paper's: four in the first
    tenth of the steps (arXiv 2510.02823); of 1,000 steps these are the steps 25, 50, 75 and 100. For language
    models a later window is often better: docs/results.md has the numbers.

    With `trigger="settled"` every layer of a Mamba is cut once, as the whole goal says, after the first step in the
    window at which its ranking of states stands still: over the last `settled_over` of the run it moved no further
    than two calibration draws lie apart, at `settled_patience` measurements in a row
    (`theory.rankings.is_within_noise`). A layer that has settled stays so, unless a rollback takes the model back.
    Layers with one goal for all are cut when the last of them has settled; with `allocation="per_layer"` each is cut
    by itself, with its part of a loss budget. What has not settled at the end of the window is cut there as it is.

    Example: of 1,000 steps, `CompreSSMSchedule(trigger="settled", start=0.05, end=0.9, monitor_steps=20)` measures
    after every 20th and compares with 100 before; it cuts after 140 at the earliest, after 900 at the latest.

    Raises:
        ValueError: the window lies outside the run, there is no event, or the values cannot hold together.
    """

    start: float = option(0.0, "Start of the window of cuts, as a fraction of the run, in [0, 1).")
    end: float = option(0.1, "End of the window of cuts, as a fraction of the run, in (start, 1].")
    events: int | None = option(
        None,
        "Number of cuts, equidistant in the window, the last at its end; by default 4. With the trigger 'settled' it "
        "is 1: each layer is cut once.",
    )
    trigger: str = option(
        "fixed",
        "When to cut within the window: 'fixed': at equidistant steps; 'settled': a layer of a Mamba when its ranking "
        "of states stands still to within the noise of the calibration data, at the latest at the end of the window.",
    )
    settled_over: float = option(
        0.1,
        "With the trigger 'settled': for how long a ranking has to stand still, as a fraction of the run, in (0, 1).",
    )
    settled_patience: int = option(
        2, "With the trigger 'settled': at how many measurements in a row a ranking has to stand still."
    )
    monitor_steps: int | None = option(
        None,
        "Measure and record the singular values every so many steps, to look at; with the trigger 'settled' the "
        "rankings as well.",
    )
    rollback_tolerance: float | None = option(
        None,
        "Undo a cut after which the evaluation metric is worse than before it by more than this share of its value.",
    )
    rollback_patience: int = option(1, "Evaluations after a cut in which the metric is watched.")
    rollback_storage: str = option(
        "memory", "Where model and optimizer wait as they were before a cut: 'memory' (of the CPU) or 'disk'."
    )
    on_rollback: str = option("stop", "After a rollback: 'stop' cutting, or 'halve' how deep further cuts go.")

    def __post_init__(self):
        require(0 <= self.start < 1, "start", self.start, "a fraction of the run, in [0, 1)")
        require(self.start < self.end <= 1, "end", self.end, f"a fraction of the run, in (start = {self.start}, 1]")
        self._check_trigger()
        require(is_count(self.events), "events", self.events, "a whole number, at least 1")
        monitor_steps = self.monitor_steps
        require(
            monitor_steps is None or is_count(monitor_steps),
            "monitor_steps",
            monitor_steps,
            "a whole number, at least 1",
        )
        tolerance, patience = self.rollback_tolerance, self.rollback_patience
        require(tolerance is None or 0 <= tolerance < float("inf"), "rollback_tolerance", tolerance, "a share, ≥ 0")
        require(is_count(patience), "rollback_patience", patience, "a whole number, at least 1")
        for name, allowed in (("rollback_storage", ROLLBACK_STORAGES), ("on_rollback", ON_ROLLBACK)):
            require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")

    def _check_trigger(self) -> None:
        """Refuse what does not go together with the trigger, and fill in the number of events."""
        require(self.trigger in TRIGGERS, "trigger", self.trigger, f"one of {', '.join(TRIGGERS)}")
        self.events = EVENTS[self.trigger] if self.events is None else self.events
        require(0 < self.settled_over < 1, "settled_over", self.settled_over, "a fraction of the run, in (0, 1)")
        patience = self.settled_patience
        require(is_count(patience), "settled_patience", patience, "a whole number, at least 1")
        if self.trigger == "settled":
            require(self.events == 1, "events", self.events, "1 with trigger = 'settled', which cuts each layer once")
            require(
                self.monitor_steps is not None,
                "monitor_steps",
                None,
                "a whole number with trigger = 'settled': measure every so many steps whether layers have settled",
            )

    def event_steps(self, max_steps: int) -> list[int]:
        """Return the optimizer steps after which to cut, ascending; with the trigger "settled" the latest ones.

        Raises:
            ValueError: the window of a run this short is too small for the events.
        """
        width = (self.end - self.start) / self.events
        shares = [self.start + width * i for i in range(1, self.events)]
        steps = [round(max_steps * share) for share in (*shares, self.end)]
        if steps[0] < 1 or len(set(steps)) < len(steps):
            raise ValueError(
                f"{self.events} cuts do not fit between {self.start:.0%} and {self.end:.0%} of {max_steps} steps "
                f"(they would fall on steps {steps}): give fewer events, a wider window or more steps."
            )
        return steps

    def settling_steps(self, max_steps: int) -> int:
        """Return the number of steps over which a ranking has to stand still."""
        return math.ceil(max_steps * _as_written(self.settled_over))

    def comparison_steps(self, max_steps: int) -> list[int]:
        """Return the steps in the window at which rankings can be compared with earlier ones, ascending."""
        opens = math.floor(max_steps * _as_written(self.start)) + 1
        first = max(opens, self.monitor_steps + self.settling_steps(max_steps))
        first = math.ceil(first / self.monitor_steps) * self.monitor_steps
        return list(range(first, round(max_steps * self.end) + 1, self.monitor_steps))

    def possible_steps(self, max_steps: int) -> list[int]:
        """Return the steps after which the trigger "settled" may cut layers, ascending; the last ends the window.

        Raises:
            ValueError: the window is too small for a layer to settle.
        """
        settled = self.comparison_steps(max_steps)[self.settled_patience - 1 :]
        if not settled:
            raise ValueError(
                f"no layer could settle between {self.start:.0%} and {self.end:.0%} of {max_steps} steps: rankings "
                f"measured every {self.monitor_steps} steps (monitor_steps) have to stand still over "
                f"{self.settling_steps(max_steps)} steps (settled_over), {self.settled_patience} times in a row "
                "(settled_patience). Measure more often, or give a wider window or more steps."
            )
        return sorted({*settled, *self.event_steps(max_steps)})


def _as_written(share: float) -> Fraction:
    """Return the number that was meant: for 0.07 seven hundredths; in floating point 100 * 0.07 is not quite 7."""
    return Fraction(str(float(share)))
