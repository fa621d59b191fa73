"""The trigger "settled" by itself: which layers are due, when, and with what share of the budget."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import build_model
from settling_fixtures import SETTLED
from transformers import HfArgumentParser

from hf_compressm import CompreSSMConfig, CompreSSMSchedule
from hf_compressm.architectures import state_layers
from hf_compressm.storage.history import History
from hf_compressm.storage.records import Observation, ReductionEvent
from hf_compressm.surgery.shrink_and_grow import set_state_sizes
from hf_compressm.theory.rankings import compare_rankings
from hf_compressm.training.trigger import Trigger


def first_cut(movement, seed: int, draws: int = 2, **schedule) -> tuple[int, dict[int, str]]:
    """Step and reason (by layer index) of the cut of a model of one layer whose scores go as `movement` says.

    There are 200 steps. Each draw sees the scores through noise of its own, which is the same at every step, as its
    batches are.
    """
    model = build_model(num_hidden_layers=1, state_size=32)
    schedule = CompreSSMSchedule(**SETTLED | {"settled_patience": 2} | schedule)
    trigger = Trigger(schedule, CompreSSMConfig(target_state_size=4), 200)
    history, generator = History({}), torch.Generator().manual_seed(seed)
    noise = [(0.3 * torch.randn(32, generator=generator, dtype=torch.float64)).exp() for _ in range(2)]
    score = torch.randn(32, generator=generator, dtype=torch.float64).exp()
    for step in range(2, 201, 2):
        score = movement(score, generator)
        first, second = score * noise[0], score * noise[1]
        if draws == 1:  # the second has nothing to do with the first
            second = second[torch.randperm(32, generator=generator)]
        floor = compare_rankings(first, second)
        measured = {"scores": [first], "rank_noise": [floor.correlation], "share_noise": [floor.distance]}
        observation = Observation(step, [0], [32], None, None, 0.0, [first.sort(descending=True).values], **measured)
        trigger.compare(observation, history)
        history.observations.append(observation)
        due = trigger.due(state_layers(model), history, step)
        if due is not None:
            return step, due.reasons
    raise AssertionError("never cut")


def shuffled(score, generator):
    return score[torch.randperm(len(score), generator=generator)]


def unmoved(score, generator):
    return score


def drifting(score, generator):
    """Their logarithms are a stationary process, of correlation 0.97 from one point to the next."""
    step = torch.randn(len(score), generator=generator, dtype=torch.float64)
    return (0.97 * score.log() + (1 - 0.97**2) ** 0.5 * step).exp()


@pytest.mark.parametrize("seed", range(40))
def test_a_ranking_that_is_shuffled_at_every_point_waits_for_the_end_of_the_window(seed):
    assert first_cut(shuffled, seed, settled_patience=1) == (170, {0: "window ended"})


@pytest.mark.parametrize("seed", range(10))
def test_a_ranking_that_cannot_be_measured_has_not_settled(seed):
    assert first_cut(unmoved, seed, draws=1, settled_patience=1) == (170, {0: "window ended"})


@pytest.mark.parametrize(("patience", "step"), [(1, 22), (2, 24), (5, 30)])
def test_what_does_not_move_is_cut_at_the_first_chance(patience, step):
    """Measured first at step 2, compared over a tenth of the run."""
    assert first_cut(unmoved, 0, settled_patience=patience) == (step, {0: "settled"})


@pytest.mark.parametrize("seed", range(10))
def test_a_drift_too_slow_to_be_seen_between_two_points_is_seen_over_the_whole_stretch(seed):
    assert first_cut(drifting, seed, settled_over=0.01) == (24, {0: "settled"})  # what comparing neighbours would say
    assert first_cut(drifting, seed, settled_over=0.2) == (170, {0: "window ended"})


def history_of(*events: tuple[int, list[str | None], int | None]) -> History:
    """(step, reasons, step of the rollback) of each event."""
    record = ReductionEvent(
        step=0,
        layers=[0, 1, 2],
        state_sizes_before=[16, 16, 16],
        state_sizes_after=[16, 16, 8],
        kept_states=[list(range(16)), list(range(16)), list(range(8))],
        score_discarded=[0.0, 0.0, 0.1],
        single_layer_loss_change=None,
        loss_before=2.0,
        loss_after=2.01,
        tokens=1,
        seconds=0.0,
        measuring_seconds=0.0,
        criterion="output",
        compensate=True,
        hankel_singular_values=[torch.ones(16, dtype=torch.float64)] * 3,
    )
    events = [replace(record, step=step, reasons=why, rolled_back_at=undone) for step, why, undone in events]
    return History({}, events=events)


def test_layers_that_are_cut_later_keep_their_part_of_the_loss_budget():
    model = build_model(num_hidden_layers=3)
    config = CompreSSMConfig(loss_budget=0.05, allocation="per_layer")
    trigger, history = (
        Trigger(CompreSSMSchedule(**SETTLED), config, 20),
        history_of((6, [None, None, "settled"], None)),
    )
    seen = {"settled_points": [1, 0, 3], "rank_noise": [1.0] * 3, "share_noise": [0.0] * 3}
    history.observations.append(Observation(8, [0, 1, 2], [16] * 3, None, None, 0.0, [], **seen))
    due = trigger.due(state_layers(model), history, 8)
    assert due.reasons == {0: "settled"} and due.config.skip_layers == [1, 2]
    assert due.config.loss_budget == pytest.approx((0.05 - 0.01) / 2)
    history.events += history_of((8, ["settled", None, None], None)).events
    due = trigger.due(state_layers(model), history, 17)
    assert due.reasons == {1: "window ended"} and due.config.skip_layers == [0, 2]
    assert due.config.loss_budget == pytest.approx(0.05 - 0.02)


def test_layers_at_the_target_and_layers_to_skip_are_not_waited_for():
    model = build_model(num_hidden_layers=3)
    config = CompreSSMConfig(target_state_size=8, allocation="per_layer", skip_layers=[0])
    set_state_sizes(model, {0: 16, 1: 6, 2: 16})
    due = Trigger(CompreSSMSchedule(**SETTLED), config, 20).due(state_layers(model), History({}), 17)
    assert due.reasons == {2: "window ended"} and due.config.skip_layers == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trigger": "soon"}, "trigger = 'soon'; allowed: one of fixed, settled"),
        ({"monitor_steps": None}, "monitor_steps = None; allowed: a whole number with trigger = 'settled'"),
        ({"events": 4}, "events = 4; allowed: 1 with trigger = 'settled', which cuts each layer once"),
        ({"settled_over": 1.0}, "settled_over = 1.0; allowed: a fraction of the run, in (0, 1)"),
        ({"settled_patience": 0}, "settled_patience = 0; allowed: a whole number, at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CompreSSMSchedule(**(SETTLED | options))


def test_the_options_come_from_the_command_line():
    words = "--trigger settled --start 0.05 --end 0.9 --monitor_steps 20 --settled_over 0.2 --settled_patience 3"
    (schedule,) = HfArgumentParser(CompreSSMSchedule).parse_args_into_dataclasses(words.split())
    assert (schedule.trigger, schedule.events, schedule.settled_over, schedule.settled_patience) == (
        "settled",
        1,
        0.2,
        3,
    )
    assert schedule.possible_steps(1000)[0] == 260 and schedule.possible_steps(1000)[-1] == 900
    (fixed,) = HfArgumentParser(CompreSSMSchedule).parse_args_into_dataclasses([])
    assert (fixed.trigger, fixed.events) == ("fixed", 4)
    assert CompreSSMSchedule(**asdict(schedule)) == schedule  # as Trainer rebuilds it
