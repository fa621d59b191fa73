"""A run that is resumed with more steps, or fewer, makes as many cuts as its schedule says: what was done counts."""

import re

import pytest
from conftest import build_model, build_trainer
from settling_fixtures import SETTLED
from test_trigger import history_of

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.training.trigger import Trigger

TWO = CompreSSMSchedule(end=0.75, events=2)  # of 8 steps: after 3 and 6; of 16: after 6 and 12
STANDING = CompreSSMSchedule(**SETTLED)  # of 8 steps: after 4 or 6, at the latest 7; of 16: at the latest 14
GOALS = {
    "tolerance": ({"tolerance": 0.2, "min_reduction": 0.0}, TWO, [3, 6]),
    "target": ({"target_state_size": 4}, TWO, [3, 6]),
    "budget": ({"loss_budget": 0.05, "min_reduction": 0.0}, TWO, [3, 6]),
    "settled": ({"target_state_size": 4}, STANDING, [7]),
    "settled layers": ({"target_state_size": 4, "allocation": "per_layer"}, STANDING, [4, 7]),
}


def train(folder, dataset, goal: str, max_steps: int, checkpoint=None, **changes):
    """(model, history) of a run that saves after every fourth step, resumed from such a checkpoint or not."""
    config, schedule, _ = GOALS[goal]
    callback = CompreSSMCallback(CompreSSMConfig(calibration_batches=4, **config), schedule)
    options = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 4}
    trainer = build_trainer(folder, dataset, [callback], model=build_model(), **(options | changes))
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == max_steps
    return trainer.model, callback.history


def events_of(history) -> list[dict]:
    return history.to_dict()["events"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset):
    """Goal → (folder, model, history) of a run of 8 steps."""
    install_scan()
    folders = {goal: tmp_path_factory.mktemp("finished") for goal in GOALS}
    return {goal: (folder, *train(folder, dataset, goal, 8)) for goal, folder in folders.items()}


@pytest.mark.parametrize("goal", GOALS)
def test_a_finished_run_that_goes_on_is_not_cut_again(finished, dataset, tmp_path, caplog, goal):
    folder, model, before = finished[goal]
    assert before.steps == GOALS[goal][2] and before.standing_cuts
    longer, history = train(tmp_path, dataset, goal, 16, str(folder / "checkpoint-8"))
    assert events_of(history) == events_of(before) and state_sizes(longer) == state_sizes(model)
    assert "cuts were due" not in caplog.text


@pytest.mark.parametrize("goal", ["tolerance", "target", "budget"])
def test_what_is_left_is_done_at_its_step_of_the_longer_run(finished, dataset, tmp_path, caplog, goal):
    folder, _, before = finished[goal]
    _, history = train(tmp_path, dataset, goal, 16, str(folder / "checkpoint-4"))
    assert events_of(history)[0] == events_of(before)[0] and history.steps == [3, 12]
    first, last = (event.goal for event in history.events)
    spent = before.events[0].loss_after - before.events[0].loss_before
    assert (
        last
        == {
            "tolerance": first,
            "target": {"target_state_size": 4},
            "budget": {"loss_budget": pytest.approx(0.05 - max(0.0, spent))},
        }[goal]
    )
    assert "cuts were due" not in caplog.text


def test_each_layer_that_settles_is_cut_once_in_all(finished, dataset, tmp_path):
    folder, _, before = finished["settled layers"]
    model, history = train(tmp_path, dataset, "settled layers", 16, str(folder / "checkpoint-4"))
    assert events_of(history)[0] == events_of(before)[0] and state_sizes(model) == {0: 4, 1: 4}
    reasons = [event.by_layer("reasons") for event in history.events]
    assert sorted(layer for each in reasons for layer, why in each.items() if why) == [0, 1]


def test_what_a_shorter_run_has_passed_is_missed_and_said(finished, dataset, tmp_path, caplog):
    folder, _, before = finished["target"]
    _, history = train(tmp_path, dataset, "target", 5, str(folder / "checkpoint-4"))  # of 5 steps: after 2 and 4
    assert events_of(history) == events_of(before)[:1]
    assert "By step 4 cuts were due after steps [3, 4]; the history has them at [3]" in caplog.text


def test_a_run_with_no_cut_left_needs_no_evaluation_before_one(dataset, tmp_path):
    """Of 8 steps after 4 and 8; of 16 after 8 and 16, but both are done."""
    schedule = CompreSSMSchedule(end=1.0, events=2, rollback_tolerance=1e9)

    def run(max_steps, **options):
        callback = CompreSSMCallback(CompreSSMConfig(target_state_size=4), schedule)
        evaluated = {"eval_dataset": dataset.select(range(8)), "eval_strategy": "steps"}
        saved = {"save_strategy": "steps", "save_steps": 8, "max_steps": max_steps}
        trainer = build_trainer(tmp_path, dataset, [callback], **saved, **evaluated, **options)
        trainer.train(resume_from_checkpoint=max_steps > 8)
        return callback.history.steps

    assert run(8, eval_steps=2) == [4, 8]
    assert run(16, eval_steps=100, metric_for_best_model="eval_runtime") == [4, 8]


def test_a_schedule_that_changed_says_that_the_cuts_so_far_count(finished, dataset, tmp_path, caplog, monkeypatch):
    folder, *_ = finished["target"]
    monkeypatch.setitem(GOALS, "more", (GOALS["target"][0], CompreSSMSchedule(end=0.75, events=3), None))
    _, history = train(tmp_path, dataset, "more", 16, str(folder / "checkpoint-8"))
    assert history.steps == [3, 6, 12]  # the steps of three cuts in 16 steps: 4, 8 and 12
    assert re.search("another configuration or schedule .* The cuts so far, 2, count among those", caplog.text)


@pytest.mark.parametrize(
    ("events", "step", "due"),
    [
        ([], 16, []),
        ([(6, [None, None, "settled"], None)], 16, [6]),
        ([(6, [None, None, "settled"], None)], 18, [6, 17]),  # two layers never came to their turn
        ([(6, ["settled"] * 3, None)], 18, [6]),
        ([(6, ["settled"] * 3, 8)], 18, [6, 17]),  # taken back, and never cut again
        ([(17, ["window ended"] * 3, 18)], 18, [17]),  # taken back when no more time was left
    ],
)
def test_layers_that_wait_beyond_their_window_are_missed(events, step, due):
    trigger = Trigger(STANDING, CompreSSMConfig(target_state_size=4, allocation="per_layer"), 20)
    assert trigger.steps_due(state_layers(build_model(num_hidden_layers=3)), history_of(*events), step) == due
