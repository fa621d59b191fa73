"""A trigger says when a layer is cut: at fixed steps, or when its ranking of states has settled.

It decides by what the records say. They go into every checkpoint, so an interrupted run decides as the uninterrupted
one.
"""

from dataclasses import dataclass, replace

from ..analysis.checks import allocation_of, reducible_size
from ..architectures import StateLayers
from ..config import CompreSSMConfig
from ..storage.history import History
from ..storage.records import REASONS, Observation
from ..theory.rankings import Ranking, compare_rankings, is_within_noise
from .schedule import CompreSSMSchedule

SETTLED, WINDOW_ENDED = REASONS
NOT_MEASURED = ("magnitude", "random")  # these criteria take nothing from data, and so have no noise


def check_trigger(schedule: CompreSSMSchedule, config: CompreSSMConfig, layers: StateLayers | None = None) -> None:
    """Refuse to wait for rankings that have no noise to compare with.

    Raises:
        ValueError: the criterion, or a model of this type, takes nothing from data; the message names a remedy.
    """
    if schedule.trigger != "settled":
        return
    if config.criterion in NOT_MEASURED:
        raise ValueError(
            f"trigger = 'settled' with criterion = '{config.criterion}', which ranks states without data: there is no "
            "noise to compare a movement with. Give another criterion, or trigger = 'fixed'."
        )
    if layers is not None and not layers.family.needs_data:
        raise ValueError(
            f"trigger = 'settled' with a model of type '{layers.model.config.model_type}', whose states are ranked by "
            "its weights alone: there is no noise to compare a movement with. Give trigger = 'fixed'; monitor_steps "
            "shows how far the singular values still move."
        )


@dataclass(frozen=True)
class DueEvent:
    """A due event says what is to be cut now.

    Attributes:
        config: what this event has to achieve, and in which layers.
        reasons: why it is the turn of a layer, by layer index; None at a fixed step.
    """

    config: CompreSSMConfig
    reasons: dict[int, str] | None = None

    def reasons_of(self, layers: list[int]) -> list[str | None] | None:
        """Return the reasons as a record has them: for each layer, None where it is not its turn."""
        return None if self.reasons is None else [self.reasons.get(layer) for layer in layers]


class Trigger:
    """A trigger says when which layers are cut, and what has to be measured to know.

    Args:
        schedule, config: the schedule and the configuration of the run.
        max_steps: the number of optimizer steps of the run.

    Attributes:
        steps: the steps after which a cut is due, or with the trigger "settled" may be; ascending, the last at the
            end of the window.
    """

    def __init__(self, schedule: CompreSSMSchedule, config: CompreSSMConfig, max_steps: int):
        self.schedule, self.config = schedule, config
        self.waits = schedule.trigger == "settled"
        self.steps = schedule.possible_steps(max_steps) if self.waits else schedule.event_steps(max_steps)
        self._comparison_steps = set(schedule.comparison_steps(max_steps)) if self.waits else set()
        self._steps = frozenset(self.steps)
        self._settling_steps = schedule.settling_steps(max_steps)

    def steps_left(self, layers: StateLayers, history: History) -> list[int]:
        """Return the steps after which cuts are due, or may be, when those of the history are done.

        What was done counts, wherever it was done: a run that is resumed with more steps, or fewer, has its schedule
        at other steps, and makes no more cuts than that says. A cut that a rollback took back has had its turn, too;
        layers that wait to settle wait anew.
        """
        if self.waits:
            return self.steps if self._waiting(layers, history) else []
        return self.steps[len(history.events) :]

    def steps_due(self, layers: StateLayers, history: History, step: int) -> list[int]:
        """Return the steps of the events that a history up to this step should have."""
        left = self.steps_left(layers, history)
        if self.waits:  # the last moment for all that wait; a rollback after it may have left some
            left = [end for end in left[-1:] if end not in history.steps]
        return history.steps + [due for due in left if due <= step]

    def may_cut_after(self, step: int) -> bool:
        """Say whether a cut may be due after this step at all; no model is needed to know."""
        return step in self._steps

    def due(self, layers: StateLayers, history: History, step: int) -> DueEvent | None:
        """Return the event after this step; None where there is none."""
        if not self.may_cut_after(step):
            return None
        if self.waits:
            return self._due_when_settled(layers, history, step)
        ahead = [due for due in self.steps_left(layers, history) if due >= step]
        if step not in ahead:
            return None
        size = reducible_size(self.config, layers)
        return DueEvent(self.config.for_event(size, len(ahead), history.loss_spent, history.rollbacks))

    def draws(self, layers: StateLayers, history: History, step: int) -> int:
        """Return the number of draws that an observation takes the scores of: 0, 1 to be compared later, or 2."""
        if not self.waits or step > self.steps[-1] or not self._waiting(layers, history):
            return 0
        return 2 if step in self._comparison_steps else 1

    def compare(self, observation: Observation, history: History) -> None:
        """Complete an observation of two draws by how far each layer came, and how often in a row it stood still.

        Args:
            history: the history up to the observation before this one.
        """
        earlier = [seen for seen in history.observations_since_rollback if seen.scores is not None]
        comparable = [seen for seen in earlier if seen.step <= observation.step - self._settling_steps]
        if observation.rank_noise is None or not comparable:
            return
        then, noise = comparable[-1], map(Ranking, observation.rank_noise, observation.share_noise)
        scores = then.by_layer("scores")
        moved = [
            compare_rankings(scores[layer], now) if scores[layer].shape == now.shape else None  # it was cut in between
            for layer, now in observation.by_layer("scores").items()
        ]
        stands = [m is not None and is_within_noise(m, floor) for m, floor in zip(moved, noise, strict=True)]
        points = earlier[-1].by_layer("settled_points")
        observation.compared_with = then.step
        observation.rank_correlation = [None if each is None else each.correlation for each in moved]
        observation.share_distance = [None if each is None else each.distance for each in moved]
        observation.settled_points = [
            points.get(layer, 0) + 1 if still else 0 for layer, still in zip(observation.layers, stands, strict=True)
        ]

    def _due_when_settled(self, layers: StateLayers, history: History, step: int) -> DueEvent | None:
        waiting, as_one = self._waiting(layers, history), allocation_of(self.config, layers) != "per_layer"
        why = {index: SETTLED for index in waiting if self._has_settled(index, history)}
        if step == self.steps[-1]:
            why = dict.fromkeys(waiting, WINDOW_ENDED) | why
        if not why or (as_one and len(why) < len(waiting)):
            return None
        others = self.config.skip_layers if as_one else [index for index in layers if index not in why]
        config = replace(self.config, skip_layers=others)
        size, part = reducible_size(config, layers), len(why) / len(waiting)
        config = config.for_event(size, 1, history.loss_spent, history.rollbacks, part)
        return DueEvent(config, why)

    def _waiting(self, layers: StateLayers, history: History) -> list[int]:
        """Return the layers still to be cut: above the target, and not cut before, or taken back."""
        reasons = [event.by_layer("reasons") for event in history.events if event.rolled_back_at is None]
        done = {layer for each in reasons for layer, reason in each.items() if reason is not None}
        done |= set(self.config.skip_layers)
        smallest = self.config.target_state_size or 0
        return [index for index, size in layers.sizes.items() if index not in done and size > smallest]

    def _has_settled(self, layer: int, history: History) -> bool:
        """Say whether the layer has settled so far; with one size for all it then waits for the others."""
        points = [seen.by_layer("settled_points").get(layer, 0) for seen in history.observations_since_rollback]
        return max(points, default=0) >= self.schedule.settled_patience
