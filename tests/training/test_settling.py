"""The trigger "settled": a layer is cut when its ranking of states stands still, and no earlier."""

import itertools
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import assert_identical, build_model, build_trainer, losses_of, weights_of
from test_rollback import WorseAt
from transformers import HfArgumentParser

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    CompreSSMSchedule,
    LRUConfig,
    LRUForSequenceClassification,
    install_scan,
)
from hf_compressm.plotting import plot_settling, save_figure
from hf_compressm.sharing.pictures import write_pictures
from hf_compressm.storage.history import History, load_history
from hf_compressm.storage.records import Observation, ReductionEvent
from hf_compressm.surgery.shrink_and_grow import set_state_sizes
from hf_compressm.theory.rankings import Ranking, compare_rankings, is_within_noise, rank_correlation, share_distance
from hf_compressm.training.trigger import Trigger

# Of 20 steps: compared with two steps before at 4, 6 … 16; cut after 4 at the earliest, after 17 at the latest.
SETTLED = {"trigger": "settled", "start": 0.1, "end": 0.85, "monitor_steps": 2, "settled_patience": 1}
TARGET = {"target_state_size": 4, "calibration_batches": 4}


def waiting_callback(config: dict | None = None, **changes) -> CompreSSMCallback:
    return CompreSSMCallback(CompreSSMConfig(**(TARGET | (config or {}))), CompreSSMSchedule(**(SETTLED | changes)))


def test_rank_correlation_counts_pairs_and_leaves_ties_out():
    def by_pairs(x, y):
        score = pairs_x = pairs_y = 0
        for i, j in itertools.combinations(range(len(x)), 2):
            a, b = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            score, pairs_x, pairs_y = score + a * b, pairs_x + abs(a), pairs_y + abs(b)
        return score / (pairs_x * pairs_y) ** 0.5

    generator = torch.Generator().manual_seed(0)
    for size in (2, 5, 33):
        x = torch.rand(size, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 4, (size,), generator=generator).double() + x.round()
        if len(y.unique()) > 1:
            assert rank_correlation(x, y) == pytest.approx(by_pairs(x.tolist(), y.tolist()), abs=1e-12)
        assert rank_correlation(x, 3 * x) == pytest.approx(1) and rank_correlation(x, -x) == pytest.approx(-1)
    # Kendall's own kind of table: 12 = 15 - 3 pairs agree of 15 untied in x and 14 in y.
    x, y = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([1.0, 1, 2, 4, 3, 5])
    assert rank_correlation(x, y) == pytest.approx((13 - 1) / (15 * 14) ** 0.5)
    flat = torch.ones(4)
    assert (rank_correlation(flat, flat), rank_correlation(flat, torch.rand(4))) == (1.0, 0.0)


def test_share_distance_is_the_score_that_changed_its_state():
    left, right = torch.tensor([3.0, 1, 0, 0]), torch.tensor([2.0, 2, 2, 2])
    assert share_distance(left, right) == pytest.approx(0.5)
    assert share_distance(left, 7 * left) == pytest.approx(0) and share_distance(left, left.flip(0)) == pytest.approx(
        1
    )


def test_a_layer_stands_still_only_within_the_noise_and_where_there_is_a_ranking_at_all():
    noise = Ranking(correlation=0.7, distance=0.1)
    assert is_within_noise(Ranking(0.7, 0.1), noise)
    assert not is_within_noise(Ranking(0.69, 0.1), noise)  # the order moved
    assert not is_within_noise(Ranking(0.7, 0.11), noise)  # the shares moved
    assert not is_within_noise(Ranking(1.0, 0.0), Ranking(0.4, 0.3))  # two draws disagree: nothing is known


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
        due = trigger.due(model, history, step)
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


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """(trainer, callback) of a run whose layers settle one after the other; a checkpoint after every fourth step."""
    install_scan()
    return train(tmp_path_factory.mktemp("settling"), dataset)


LONG = {"max_steps": 60, "save_strategy": "steps", "save_steps": 4}


def train(folder, dataset, checkpoint=None, seed=0):
    callback = waiting_callback(
        {"allocation": "per_layer", "calibration_batches": 8}, monitor_steps=4, settled_over=0.2, end=0.9
    )
    trainer = build_trainer(folder, dataset, model=build_model(seed=seed), **LONG)
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, callback


def test_each_layer_is_cut_by_itself_when_it_has_settled(run):
    trainer, callback = run
    first, second = callback.history.events
    assert first.reasons == [None, "settled"] and second.reasons == ["settled", None]
    assert (first.state_sizes_after, second.state_sizes_after) == ([16, 4], [4, 4])
    assert first.step < second.step < 54
    for event, layer in ((first, 1), (second, 0)):
        (seen,) = [each for each in callback.history.observations if each.step == event.step]
        (then,) = [each for each in callback.history.observations if each.step == seen.compared_with]
        assert then.step == event.step - 12
        moved = compare_rankings(then.scores[layer], seen.scores[layer])
        assert (moved.correlation, moved.distance) == (seen.rank_correlation[layer], seen.share_distance[layer])
        assert moved.correlation >= seen.rank_noise[layer] and moved.distance <= seen.share_noise[layer]
        assert seen.settled_points[layer] == 1
    assert losses_of(trainer)[60] < losses_of(trainer)[first.step]


def test_with_one_size_for_all_the_last_layer_to_settle_decides(tmp_path, dataset, run):
    callback = waiting_callback({"calibration_batches": 8}, monitor_steps=4, settled_over=0.2, end=0.9)
    trainer = build_trainer(tmp_path, dataset, [callback], max_steps=60)
    trainer.train()
    (event,) = callback.history.events
    assert event.reasons == ["settled", "settled"] and trainer.model.config.state_size == 4
    assert run[1].history.events[0].step < event.step < 54
    assert callback.history.observations[-1].scores is None  # nothing waits any longer


def test_what_has_not_settled_is_cut_at_the_end_of_the_window(tmp_path, dataset, capsys):
    callback = waiting_callback(settled_patience=7)  # as often as there are comparisons
    build_trainer(tmp_path, dataset, [callback]).train()
    (event,) = callback.history.events
    assert (event.step, event.reasons, event.state_sizes_after) == (17, ["window ended"] * 2, [4, 4])
    assert "CompreSSM, step 17 of 20: state size 16 → 4; window ended: layers 0, 1" in capsys.readouterr().out


STILL = {"learning_rate": 0.0, "max_steps": 12}


@pytest.mark.parametrize(("patience", "step"), [(1, 4), (2, 6)])
def test_a_model_that_does_not_learn_is_cut_at_once(tmp_path, dataset, patience, step):
    callback = waiting_callback({"calibration_batches": 40}, settled_patience=patience)  # enough to rank by
    build_trainer(tmp_path, dataset, [callback], **STILL).train()
    (event,) = callback.history.events
    assert (event.step, event.reasons) == (step, ["settled"] * 2)
    assert callback.history.observations[1].rank_correlation == [1.0, 1.0]


@pytest.mark.parametrize("place", ["before", "at the first", "between", "after"])
def test_an_interrupted_run_cuts_at_the_same_steps(tmp_path, dataset, run, place):
    trainer, callback = run
    first, second = callback.history.steps
    step = {"before": first - 4, "at the first": first, "between": second - 4, "after": second + 4}[place]
    resumed, again = train(tmp_path, dataset, f"{trainer.args.output_dir}/checkpoint-{step}", seed=1)
    assert losses_of(resumed) == losses_of(trainer)
    assert_identical(weights_of(resumed.model), weights_of(trainer.model))
    for left, right in zip(again.history.observations, callback.history.observations, strict=True):
        left = replace(left, seconds=0.0, hankel_singular_values=[], scores=None)
        assert left == replace(right, seconds=0.0, hankel_singular_values=[], scores=None)
    events = zip(again.history.events, callback.history.events, strict=True)
    assert all(
        (left.step, left.kept_states, left.reasons) == (right.step, right.kept_states, right.reasons)
        for left, right in events
    )


def test_the_files_hold_what_the_decision_rests_on(run):
    trainer, callback = run
    loaded = load_history(f"{trainer.args.output_dir}/checkpoint-60")
    assert loaded.to_dict() == callback.history.to_dict()
    scores = [seen.scores for seen in loaded.observations]
    assert scores[0][1].shape == (16,) and scores[-1] is None


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
    due = trigger.due(model, history, 8)
    assert due.reasons == {0: "settled"} and due.config.skip_layers == [1, 2]
    assert due.config.loss_budget == pytest.approx((0.05 - 0.01) / 2)
    history.events += history_of((8, ["settled", None, None], None)).events
    due = trigger.due(model, history, 17)
    assert due.reasons == {1: "window ended"} and due.config.skip_layers == [0, 2]
    assert due.config.loss_budget == pytest.approx(0.05 - 0.02)


def test_layers_at_the_target_and_layers_to_skip_are_not_waited_for():
    model = build_model(num_hidden_layers=3)
    config = CompreSSMConfig(target_state_size=8, allocation="per_layer", skip_layers=[0])
    set_state_sizes(model, {0: 16, 1: 6, 2: 16})
    due = Trigger(CompreSSMSchedule(**SETTLED), config, 20).due(model, History({}), 17)
    assert due.reasons == {2: "window ended"} and due.config.skip_layers == [0, 1]


@pytest.mark.parametrize(("on_rollback", "sizes"), [("stop", [[4, 4]]), ("halve", [[4, 4], [8, 8]])])
def test_a_rollback_makes_layers_settle_anew_or_ends_it(tmp_path, dataset, on_rollback, sizes):
    """Of a model that does not learn: cut at step 4, undone by the evaluation there, measured from step 6 on."""
    options = {"rollback_tolerance": 0.05, "on_rollback": on_rollback}
    callback = waiting_callback({"calibration_batches": 40}, **options)
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": dataset.select(range(16))}
    build_trainer(tmp_path, dataset, [WorseAt(4), callback], **STILL, **evaluating).train()
    events = callback.history.events
    assert [event.state_sizes_after for event in events] == sizes
    assert [(event.step, event.rolled_back_at) for event in events] == [(4, 4), (8, None)][: len(sizes)]
    compared = [seen.compared_with for seen in callback.history.observations[:4]]
    assert compared == [None, 2, None, 6 if on_rollback == "halve" else None]


def test_a_run_resumed_beyond_its_window_says_that_it_was_never_cut(tmp_path, dataset, caplog):
    options = {"save_strategy": "steps", "save_steps": 18}
    build_trainer(tmp_path, dataset, **options).train()
    trainer = build_trainer(tmp_path, dataset, [waiting_callback()], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))
    assert "By step 18 cuts were due after steps [17]; the history has them at []" in caplog.text


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


def test_rankings_without_noise_are_refused(tmp_path, dataset):
    for criterion in ("magnitude", "random"):
        with pytest.raises(ValueError, match=f"criterion = '{criterion}', which ranks states without data"):
            waiting_callback({"criterion": criterion})
    sizes = {"vocab_size": 512, "hidden_size": 16, "state_size": 16, "num_hidden_layers": 1, "num_labels": 2}
    model = LRUForSequenceClassification(LRUConfig(**sizes))
    with pytest.raises(ValueError, match="trigger = 'settled' with a model of type 'lru'"):
        build_trainer(tmp_path, dataset, [waiting_callback()], model=model).train()


def test_a_window_in_which_no_layer_could_settle_is_refused_before_training(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, [waiting_callback(settled_patience=8)])
    with pytest.raises(ValueError, match=r"no layer could settle between 10% and 85% of 20 steps.*8 times in a row"):
        trainer.train()
    assert trainer.state.global_step == 0


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


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [[1.0] * 16]},
        {"scores": [[1.0] * 15, [1.0] * 16]},
        {"scores": [[-1.0] * 16, [1.0] * 16]},
        {"scores": [[0.0] * 16, [1.0] * 16]},
        {"rank_noise": [0.5]},
        {"rank_correlation": ["x", 1.0]},
        {"settled_points": [-1, 0]},
        {"compared_with": 1.5},
    ],
)
def test_a_record_that_says_what_cannot_be_is_refused(run, change):
    content = run[1].history.to_dict()
    History.from_dict(content)
    content["observations"][4] |= change
    with pytest.raises(ValueError, match="malformed history"):
        History.from_dict(content)


def test_the_reason_of_a_cut_is_checked_when_it_is_read(run):
    content = run[1].history.to_dict()
    content["events"][0]["reasons"] = ["because", None]
    with pytest.raises(ValueError, match="malformed history.*reasons"):
        History.from_dict(content)


def test_a_picture_shows_every_layer_with_the_noise_and_its_cut(run, tmp_path):
    history = run[1].history
    figure = plot_settling(history)
    compared = [seen for seen in history.observations if seen.settled_points is not None]
    for layer, (axes, event) in enumerate(zip(figure.axes, reversed(history.events), strict=True)):
        noise, moved, still, cut = axes.lines
        assert list(noise.get_ydata()) == [seen.rank_noise[layer] for seen in history.observations if seen.rank_noise]
        assert list(moved.get_xdata()) == [seen.step for seen in compared]
        assert list(still.get_xdata()) == [seen.step for seen in compared if seen.settled_points[layer]]
        assert list(cut.get_xdata()) == [event.step] * 2 and [text.get_text() for text in axes.texts] == ["settled"]
        gaps = [seen.rank_correlation[layer] is None for seen in compared]
        assert [math.isnan(y) for y in moved.get_ydata()] == gaps
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["two calibration draws", "now and earlier, one draw", "within the noise"]
    save_figure(figure, tmp_path / "settling.png")


def test_a_picture_of_one_layer_shows_its_score_shares_as_well(run):
    history = run[1].history
    above, below = plot_settling(history, layer=1).axes
    compared = [seen for seen in history.observations if seen.settled_points is not None]
    distances = [seen.share_distance[1] for seen in compared if seen.share_distance[1] is not None]
    assert [y for y in below.lines[1].get_ydata() if not math.isnan(y)] == distances
    assert below.get_ylabel() == "distance of score shares" and above.get_title(loc="left") == "layer 1"
    with pytest.raises(ValueError, match="layer = 2; allowed: 0, 1, or None for all"):
        plot_settling(history, layer=2)
    with pytest.raises(ValueError, match="no comparison of rankings: train with CompreSSMSchedule"):
        plot_settling(replace(history, observations=[]))


def test_the_picture_lies_beside_the_final_model(run, tmp_path):
    write_pictures(tmp_path, run[1].history)
    assert (tmp_path / "settling.png").stat().st_size > 10_000
    write_pictures(tmp_path / "none", replace(run[1].history, observations=[]))
    assert not (tmp_path / "none" / "settling.png").exists()
