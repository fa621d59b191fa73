"""What to keep (`CompreSSMConfig`) and when to cut (`CompreSSMSchedule`). All checks happen when they are built."""

import math
from dataclasses import dataclass, field, replace

from .criteria import CRITERIA, SELECTIONS, Criterion, criterion_name

GOALS = ("tolerance", "target_state_size", "loss_budget", "cut_fraction")
ALLOCATIONS = ("uniform", "per_layer", "global")
ROLLBACK_STORAGES = ("memory", "disk")
ON_ROLLBACK = ("stop", "halve")
TRIGGERS = ("fixed", "settled")
EVENTS = {"fixed": 4, "settled": 1}  # by default: the paper's four; each layer once


def _help(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class CompreSSMConfig:
    """What a reduction keeps. Exactly one of `tolerance`, `target_state_size`, `loss_budget`, `cut_fraction` is given.

    Example: `CompreSSMConfig(loss_budget=0.01)` finds a state size whose measured loss is at most 0.01 nats per token
    higher, while the next smaller one breaks that. `CompreSSMConfig(tolerance=0.02)` drops the weakest states that
    together hold 2 % of the energy.

    Raises:
        ValueError: a value out of range, or values that cannot hold together.
    """

    tolerance: float | None = _help(None, "Share of the state energy that may be discarded at a cut, in (0, 1).")
    target_state_size: int | None = _help(None, "State size N to arrive at, in states.")
    loss_budget: float | None = _help(None, "Rise of the measured loss allowed over the whole run, in nats per token.")
    cut_fraction: float | None = _help(None, "Share of the present states to drop at every cut, in (0, 1).")
    criterion: Criterion | str | None = field(
        default=None,
        metadata={
            "help": f"Score by which the states of a Mamba are ranked: {', '.join(CRITERIA)}. By default 'output'; an "
            "LRU has its Hankel singular values. In Python also a function from LayerStates to an energy per state."
        },
    )
    selection: str = _help(
        "largest", f"Which of the ranked states are kept, in that number: {', '.join(SELECTIONS)}. For ablations."
    )
    compensate: bool = _help(True, "Let the kept states of a Mamba make up for the dropped ones (least squares).")
    refit: bool = _help(
        False,
        "Then fit the kept states of each layer of a Mamba to what it did uncut, on calibration data; kept only where "
        "held-out data agree. One calibration batch in three is for each of fitting, that judgement, and losses.",
    )
    allocation: str | None = _help(
        None,
        "'uniform': one state size for all layers, the largest any layer asks for; 'per_layer': to each its own; "
        "'global', for a Mamba: the goal holds for all layers together, and those keep more that matter more to the "
        "loss. By default 'uniform' for a Mamba, 'per_layer' for an LRU.",
    )
    min_reduction: float = _help(
        0.05,
        "The gate: cut only if at least this share of the states goes, in [0, 1). Not for a target or cut fraction.",
    )
    min_state_size: int = _help(1, "Never go below this many states.")
    multiple_of: int = _help(1, "Keep a multiple of this many states, rounding up.")
    skip_layers: list[int] = field(
        default_factory=list, metadata={"help": "Layers never cut, by index; not with one size for all layers."}
    )
    calibration_batches: int = _help(
        4, "Batches per analysis, at least 2: for a Mamba every other one for statistics, the rest for losses."
    )
    calibration_seed: int = _help(0, "Seed of the calibration draw, the random criterion and the random selection.")
    recall_pairs: int = _help(
        0,
        "Measure at every cut how well a language model recalls this many random pairs of tokens that it has just "
        "read, 0 for not: perplexity hides lost memory, since most tokens of a text can be guessed from the last few.",
    )

    def __post_init__(self):
        given = self.goal
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(GOALS)}; got {', '.join(given) or 'none'}.")
        for name in ("tolerance", "cut_fraction"):
            value = getattr(self, name)
            _require(value is None or 0 < value < 1, name, value, "a share in (0, 1)")
        _require(
            self.loss_budget is None or 0 < self.loss_budget < float("inf"), "loss_budget", self.loss_budget, "> 0"
        )
        for name in ("min_state_size", "multiple_of"):
            _require(_is_count(getattr(self, name)), name, getattr(self, name), "a whole number, at least 1")
        _require(0 <= self.min_reduction < 1, "min_reduction", self.min_reduction, "a share in [0, 1)")
        batches = self.calibration_batches
        _require(_is_count(batches) and batches >= 2, "calibration_batches", batches, "a whole number, at least 2")
        _require(not self.refit or batches >= 3, "calibration_batches", batches, "at least 3 with refit = True")
        pairs = self.recall_pairs
        _require(pairs == 0 or _is_count(pairs), "recall_pairs", pairs, "a whole number, 0 for none")
        for name, allowed in (("criterion", CRITERIA), ("allocation", ALLOCATIONS), ("selection", SELECTIONS)):
            value = getattr(self, name)
            optional = (value is None and name != "selection") or (name == "criterion" and callable(value))
            _require(optional or value in allowed, name, value, f"one of {', '.join(allowed)}")
        self._check_own_criterion()
        _require(
            not (self.skip_layers and self.allocation == "uniform"),
            "skip_layers",
            self.skip_layers,
            "empty: with one size for all layers none can be skipped",
        )
        _require(
            self.allocation != "global" or self.selection == "largest",
            "selection",
            self.selection,
            "'largest': a global allocation compares the layers by what their weakest states do",
        )
        self._check_target()

    def _check_own_criterion(self) -> None:
        """Records know it by its name, which has to be its own."""
        if callable(self.criterion):
            name = criterion_name(self.criterion)
            is_own_name = CRITERIA.get(name, self.criterion) is self.criterion
            _require(is_own_name, "criterion", self.criterion, f"a name that is not one of {', '.join(CRITERIA)}")

    def _check_target(self) -> None:
        target = self.target_state_size
        if target is None:
            return
        _require(_is_count(target), "target_state_size", target, "a whole number, at least 1")
        _require(
            target >= self.min_state_size, "target_state_size", target, f"≥ min_state_size = {self.min_state_size}"
        )
        _require(target % self.multiple_of == 0, "target_state_size", target, f"a multiple of {self.multiple_of}")

    def to_dict(self) -> dict:
        """JSON types only; of a criterion of one's own the name."""
        criterion = self.criterion and criterion_name(self.criterion)
        return vars(self) | {"criterion": criterion, "skip_layers": list(self.skip_layers)}

    @classmethod
    def from_dict(cls, content: dict) -> "CompreSSMConfig":
        """The inverse of `to_dict`, but for a criterion of one's own.

        Raises:
            ValueError: the criterion is known by its name only.
        """
        criterion = content.get("criterion")
        if criterion is not None and criterion not in CRITERIA:
            raise ValueError(
                f"criterion = '{criterion}' is a function of your own, and only its name was kept: build the "
                "configuration with the function; in Trainer leave restore_callback_states_from_checkpoint at False."
            )
        return cls(**content)

    @property
    def goal(self) -> dict[str, float]:
        """The one goal that is given, by its name."""
        return {name: getattr(self, name) for name in GOALS if getattr(self, name) is not None}

    def check_target(self, state_size: int) -> None:
        """Refuse a target above the present size N; anything else fits any size.

        Raises:
            ValueError: names both.
        """
        if self.target_state_size is not None and self.target_state_size > state_size:
            raise ValueError(
                f"target_state_size = {self.target_state_size} is above the model's {state_size} states; "
                f"give 1 … {state_size}."
            )

    def for_event(
        self, state_size: int, events_left: int, loss_spent: float, halvings: int = 0, part: float = 1.0
    ) -> "CompreSSMConfig":
        """The part of the whole run's goal that falls to the next of `events_left` cuts.

        A target is approached by equal factors and a loss budget spent in equal shares of what is left of it. A
        tolerance and a cut fraction speak of a single cut already. Each halving halves a tolerance, a cut fraction, a
        share of the budget; for a target, the logarithm of the factor, so that it will not be reached.

        Args:
            state_size: N now.
            events_left: cuts still to come, this one included.
            loss_spent: rise of the loss by the cuts so far, nats per token.
            halvings: how often to halve the depth of the cut, after cuts that were too deep.
            part: share of the layers still to be cut that this event cuts, and so of the loss budget.
        """
        share = 0.5**halvings
        if self.target_state_size is not None and self.target_state_size < state_size:
            step = self.round_up(state_size * (self.target_state_size / state_size) ** (share / events_left))
            reachable = self.target_state_size <= step <= state_size
            return replace(self, target_state_size=step if reachable else self.target_state_size)
        if self.loss_budget is not None:
            left = max(self.loss_budget - loss_spent, 1e-12)  # a spent budget allows nothing more
            return replace(self, loss_budget=left / events_left * share * part)
        if self.tolerance is not None:
            return replace(self, tolerance=self.tolerance * share)
        if self.cut_fraction is not None:
            return replace(self, cut_fraction=self.cut_fraction * share)
        return self

    def round_up(self, state_size: float) -> int:
        """The smallest size allowed by `multiple_of` and `min_state_size` that is not below `state_size`."""
        wanted = max(state_size - 1e-9, self.min_state_size)
        return -int(-wanted // self.multiple_of) * self.multiple_of


@dataclass
class CompreSSMSchedule:
    """When to cut: `events` equidistant cuts in the window (`start`, `end`] of the run, or each layer when it settled.

    The default is the paper's: four in the first tenth of the steps (arXiv 2510.02823). Of 1,000 steps:
    after steps 25, 50, 75 and 100. For language models a later window is often better; see the README.

    With `trigger="settled"` every layer of a Mamba is cut once, as the whole goal says, after the first step in the
    window at which its ranking of states stands still: over the last `settled_over` of the run it moved no further
    than two calibration draws lie apart, at `settled_patience` measurements in a row (`settling.is_within_noise`). A
    layer that has settled stays so, unless a rollback takes the model back. Layers with one goal for all are cut when
    the last of them has settled; with `allocation="per_layer"` each is cut by itself, with its part of a loss budget.
    What has not settled at the end of the window is cut there as it is.

    Example: of 1,000 steps, `CompreSSMSchedule(trigger="settled", start=0.05, end=0.9, monitor_steps=20)` measures
    after every 20th and compares with 100 before; it cuts after 140 at the earliest, after 900 at the latest.

    Raises:
        ValueError: a window outside the run, no event, or values that cannot hold together.
    """

    start: float = _help(0.0, "Start of the window of cuts, as a fraction of the run, in [0, 1).")
    end: float = _help(0.1, "End of the window of cuts, as a fraction of the run, in (start, 1].")
    events: int | None = _help(
        None,
        "Number of cuts, equidistant in the window, the last at its end; by default 4. With the trigger 'settled' it "
        "is 1: each layer is cut once.",
    )
    trigger: str = _help(
        "fixed",
        "When to cut within the window: 'fixed': at equidistant steps; 'settled': a layer of a Mamba when its ranking "
        "of states stands still to within the noise of the calibration data, at the latest at the end of the window.",
    )
    settled_over: float = _help(
        0.1,
        "With the trigger 'settled': for how long a ranking has to stand still, as a fraction of the run, in (0, 1).",
    )
    settled_patience: int = _help(
        2, "With the trigger 'settled': at how many measurements in a row a ranking has to stand still."
    )
    monitor_steps: int | None = _help(
        None,
        "Measure and record the singular values every so many steps, to look at; with the trigger 'settled' the "
        "rankings as well.",
    )
    rollback_tolerance: float | None = _help(
        None,
        "Undo a cut after which the evaluation metric is worse than before it by more than this share of its value.",
    )
    rollback_patience: int = _help(1, "Evaluations after a cut in which the metric is watched.")
    rollback_storage: str = _help(
        "memory", "Where model and optimizer wait as they were before a cut: 'memory' (of the CPU) or 'disk'."
    )
    on_rollback: str = _help("stop", "After a rollback: 'stop' cutting, or 'halve' how deep further cuts go.")

    def __post_init__(self):
        _require(0 <= self.start < 1, "start", self.start, "a fraction of the run, in [0, 1)")
        _require(self.start < self.end <= 1, "end", self.end, f"a fraction of the run, in (start = {self.start}, 1]")
        self._check_trigger()
        _require(_is_count(self.events), "events", self.events, "a whole number, at least 1")
        monitor_steps = self.monitor_steps
        _require(
            monitor_steps is None or _is_count(monitor_steps),
            "monitor_steps",
            monitor_steps,
            "a whole number, at least 1",
        )
        tolerance, patience = self.rollback_tolerance, self.rollback_patience
        _require(tolerance is None or 0 <= tolerance < float("inf"), "rollback_tolerance", tolerance, "a share, ≥ 0")
        _require(_is_count(patience), "rollback_patience", patience, "a whole number, at least 1")
        for name, allowed in (("rollback_storage", ROLLBACK_STORAGES), ("on_rollback", ON_ROLLBACK)):
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")

    def _check_trigger(self) -> None:
        """Fills in the number of events, too."""
        _require(self.trigger in TRIGGERS, "trigger", self.trigger, f"one of {', '.join(TRIGGERS)}")
        self.events = EVENTS[self.trigger] if self.events is None else self.events
        _require(0 < self.settled_over < 1, "settled_over", self.settled_over, "a fraction of the run, in (0, 1)")
        patience = self.settled_patience
        _require(_is_count(patience), "settled_patience", patience, "a whole number, at least 1")
        if self.trigger == "settled":
            _require(self.events == 1, "events", self.events, "1 with trigger = 'settled', which cuts each layer once")
            _require(
                self.monitor_steps is not None,
                "monitor_steps",
                None,
                "a whole number with trigger = 'settled': measure every so many steps whether layers have settled",
            )

    def event_steps(self, max_steps: int) -> list[int]:
        """The optimizer steps after which to cut, ascending; with the trigger "settled" those at the latest.

        Raises:
            ValueError: the window of a run this short has no room for the events.
        """
        width = (self.end - self.start) / self.events
        steps = [round(max_steps * (self.start + width * (i + 1))) for i in range(self.events)]
        if steps[0] < 1 or len(set(steps)) < len(steps):
            raise ValueError(
                f"{self.events} cuts do not fit between {self.start:.0%} and {self.end:.0%} of {max_steps} steps "
                f"(they would fall on steps {steps}): give fewer events, a wider window or more steps."
            )
        return steps

    def settling_steps(self, max_steps: int) -> int:
        """How many steps a ranking has to stand still."""
        return math.ceil(max_steps * self.settled_over)

    def comparison_steps(self, max_steps: int) -> list[int]:
        """The steps in the window at which rankings can be compared with earlier ones, ascending."""
        first = max(math.floor(max_steps * self.start) + 1, self.monitor_steps + self.settling_steps(max_steps))
        first = math.ceil(first / self.monitor_steps) * self.monitor_steps
        return list(range(first, round(max_steps * self.end) + 1, self.monitor_steps))

    def possible_steps(self, max_steps: int) -> list[int]:
        """The steps after which layers may be cut with the trigger "settled", ascending; the last ends the window.

        Raises:
            ValueError: no layer could be found to have settled before.
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


def _require(condition: bool, name: str, given, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {given!r}; allowed: {allowed}.")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
