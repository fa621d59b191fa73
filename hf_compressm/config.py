"""A configuration says what a reduction keeps; all its checks happen when it is built."""

from dataclasses import dataclass, field, replace

from .theory.criteria import CRITERIA, SELECTIONS, Criterion, criterion_name
from .theory.group_criteria import GROUP_CRITERIA

GOALS = ("tolerance", "target_state_size", "loss_budget", "cut_fraction")
ALLOCATIONS = ("uniform", "per_layer", "global")
BASES = ("axis", "balanced")
SCORES = tuple(CRITERIA | GROUP_CRITERIA)
CHOICES = {  # field → its choices
    "criterion": SCORES,
    "allocation": ALLOCATIONS,
    "selection": SELECTIONS,
    "basis": BASES,
}


def option(default, text: str):
    """Return a field with this default and help text, which HfArgumentParser shows."""
    return field(default=default, metadata={"help": text})


def require(condition: bool, name: str, given, allowed: str) -> None:
    """Refuse a value unless the condition holds; the error says what was given and what is allowed."""
    if not condition:
        raise ValueError(f"{name} = {given!r}; allowed: {allowed}.")


def is_count(value) -> bool:
    """Return whether the value is a whole number, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass
class CompreSSMConfig:
    """A configuration says what to keep, by `tolerance`, `target_state_size`, `loss_budget` or `cut_fraction`.

    Exactly one of the four is given. `CompreSSMConfig(loss_budget=0.01)`, say, finds a state size whose measured loss
    is at most 0.01 nats per prediction higher, while the next smaller one breaks that.
    `CompreSSMConfig(tolerance=0.02)` drops the weakest states that together hold 2 % of the score.

    Raises:
        ValueError: a value is out of range, or values do not fit together.
    """

    tolerance: float | None = option(None, "Share of the state score that may be discarded at a cut, in (0, 1).")
    target_state_size: int | None = option(None, "State size N to arrive at, in states.")
    loss_budget: float | None = option(
        None, "Rise of the measured loss allowed over the whole run, in nats per prediction."
    )
    cut_fraction: float | None = option(None, "Share of the present states to drop at every cut, in (0, 1).")
    criterion: Criterion | str | None = field(
        default=None,
        metadata={
            "help": f"Score by which states are ranked in the basis 'axis': for Mamba-1 {', '.join(CRITERIA)}; for "
            f"Mamba-2 {', '.join(GROUP_CRITERIA)}. By default 'output'. In the basis 'balanced' Hankel singular "
            "values rank them. In Python also a function from LayerStates or GroupStates to a score per state."
        },
    )
    basis: str | None = option(
        None,
        "'axis': a cut keeps some of a layer's coordinates, and the model stays one that every tool loads; "
        "'balanced': it keeps the balanced states of largest Hankel singular value. Mamba-2 and hybrids have both, "
        "by default 'axis'; Mamba-1 has 'axis', an LRU 'balanced'.",
    )
    selection: str = option(
        "largest", f"Which of the ranked states are kept, in that number: {', '.join(SELECTIONS)}. For ablations."
    )
    compensate: bool = option(True, "Let the kept states of a Mamba make up for the dropped ones (least squares).")
    refit: bool = option(
        False,
        "Then fit the kept states of each layer of a Mamba to what it did uncut, on calibration data; kept only where "
        "that helps on held-out data. Of three batches one is fitted to, one decides that, and one gives losses.",
    )
    allocation: str | None = option(
        None,
        "'uniform': one state size for all layers, the largest any layer asks for; 'per_layer': to each its own; "
        "'global', for a Mamba: the goal holds for all layers together, and those keep more that matter more to the "
        "loss. By default 'uniform' for a Mamba, 'per_layer' for an LRU.",
    )
    min_reduction: float = option(
        0.05,
        "The gate: cut only if at least this share of the states goes, in [0, 1). Not for a target or cut fraction.",
    )
    min_state_size: int = option(1, "Never go below this many states.")
    multiple_of: int = option(1, "Keep a multiple of this many states, rounding up.")
    skip_layers: list[int] = field(
        default_factory=list, metadata={"help": "Layers never cut, by index; not with one size for all layers."}
    )
    calibration_batches: int = option(
        4, "Batches per analysis, at least 2: for a Mamba every other one for statistics, the rest for losses."
    )
    calibration_seed: int = option(0, "Seed of the calibration draw, the random criterion and the random selection.")
    recall_pairs: int = option(
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
            require(value is None or 0 < value < 1, name, value, "a share in (0, 1)")
        require(
            self.loss_budget is None or 0 < self.loss_budget < float("inf"), "loss_budget", self.loss_budget, "> 0"
        )
        for name in ("min_state_size", "multiple_of"):
            require(is_count(getattr(self, name)), name, getattr(self, name), "a whole number, at least 1")
        require(0 <= self.min_reduction < 1, "min_reduction", self.min_reduction, "a share in [0, 1)")
        batches = self.calibration_batches
        require(is_count(batches) and batches >= 2, "calibration_batches", batches, "a whole number, at least 2")
        require(not self.refit or batches >= 3, "calibration_batches", batches, "at least 3 with refit = True")
        pairs = self.recall_pairs
        require(pairs == 0 or is_count(pairs), "recall_pairs", pairs, "a whole number, 0 for none")
        require(
            self.basis != "balanced" or self.criterion is None,
            "criterion",
            self.criterion,
            "none with basis = 'balanced': Hankel singular values rank the states",
        )
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            optional = (value is None and name != "selection") or (name == "criterion" and callable(value))
            require(optional or value in allowed, name, value, f"one of {', '.join(allowed)}")
        self._check_own_criterion()
        require(
            not (self.skip_layers and self.allocation == "uniform"),
            "skip_layers",
            self.skip_layers,
            "empty: with one size for all layers none can be skipped",
        )
        require(
            self.allocation != "global" or self.selection == "largest",
            "selection",
            self.selection,
            "'largest': a global allocation compares the layers by what their weakest states do",
        )
        self._check_target()

    def _check_own_criterion(self) -> None:
        """Refuse a criterion of the user's own whose name is taken, since records know it by its name."""
        if callable(self.criterion):
            name = criterion_name(self.criterion)
            is_own_name = self.criterion in (CRITERIA.get(name), GROUP_CRITERIA.get(name)) or name not in SCORES
            require(is_own_name, "criterion", self.criterion, f"a name that is not one of {', '.join(SCORES)}")

    def _check_target(self) -> None:
        target = self.target_state_size
        if target is None:
            return
        require(is_count(target), "target_state_size", target, "a whole number, at least 1")
        require(
            target >= self.min_state_size, "target_state_size", target, f"≥ min_state_size = {self.min_state_size}"
        )
        require(target % self.multiple_of == 0, "target_state_size", target, f"a multiple of {self.multiple_of}")

    def to_dict(self) -> dict:
        """Return the fields in JSON types; a criterion of the user's own is given by its name."""
        criterion = self.criterion and criterion_name(self.criterion)
        return vars(self) | {"criterion": criterion, "skip_layers": list(self.skip_layers)}

    @classmethod
    def from_dict(cls, content: dict) -> "CompreSSMConfig":
        """Build the configuration that `to_dict` describes.

        Raises:
            ValueError: the criterion is the user's own, and only its name is known.
        """
        criterion = content.get("criterion")
        if criterion is not None and criterion not in SCORES:
            raise ValueError(
                f"criterion = '{criterion}' is a function of your own, and only its name was kept: build the "
                "configuration with the function; in Trainer leave restore_callback_states_from_checkpoint at False."
            )
        return cls(**content)

    @property
    def decided_by_loss(self) -> list[str]:
        """Return the options, as they were given, by which a measured loss decides what is cut."""
        taylor = criterion_name(self.criterion) == "taylor" if self.criterion is not None else False
        decisions = {
            f"loss_budget = {self.loss_budget}": self.loss_budget is not None,
            "allocation = 'global'": self.allocation == "global",
            "criterion = 'taylor'": taylor,
            "refit = True": self.refit,
        }
        return [option for option, is_given in decisions.items() if is_given]

    @property
    def goal(self) -> dict[str, float]:
        """Return the one goal that is given, by its name."""
        return {name: getattr(self, name) for name in GOALS if getattr(self, name) is not None}

    @property
    def least_batches(self) -> int:
        """Return how many calibration batches are needed at least, so that some are held out."""
        return 3 if self.refit else 2

    def check_target(self, state_size: int) -> None:
        """Refuse a target above the present size N; the other goals fit any size.

        Raises:
            ValueError: the target is above N; the message names both.
        """
        if self.target_state_size is not None and self.target_state_size > state_size:
            raise ValueError(
                f"target_state_size = {self.target_state_size} is above the model's {state_size} states; "
                f"give 1 … {state_size}."
            )

    def for_event(
        self, state_size: int, events_left: int, loss_spent: float, halvings: int = 0, part: float = 1.0
    ) -> "CompreSSMConfig":
        """Return the part of the whole run's goal that falls to the next of `events_left` cuts.

        A target is approached by equal factors and a loss budget spent in equal shares of what is left of it. A
        tolerance and a cut fraction are goals of a single cut already. Each halving halves a tolerance, a cut fraction
        or a share of the budget; of a target it halves the logarithm of the factor, so that it will not be reached.

        Args:
            state_size: the present N.
            events_left: cuts still to come, this one included.
            loss_spent: rise of the loss by the cuts so far, nats per prediction.
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
        """Return the smallest size not below `state_size` that `multiple_of` and `min_state_size` allow."""
        wanted = max(state_size - 1e-9, self.min_state_size)
        return -int(-wanted // self.multiple_of) * self.multiple_of
