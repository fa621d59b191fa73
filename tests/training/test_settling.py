"""Runs whose layers are cut when their rankings of states stand still, each by itself, and resumed exactly."""

from dataclasses import replace

import pytest
from conftest import assert_identical, build_trainer, losses_of, weights_of
from settling_fixtures import train_until_settled, waiting_callback
from trainer_callbacks import WorseAt

from hf_compressm import LRUConfig, LRUForSequenceClassification
from hf_compressm.storage.history import load_history
from hf_compressm.theory.rankings import compare_rankings


def test_each_layer_is_cut_by_itself_when_it_has_settled(settling_run):
    trainer, callback = settling_run
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


def test_with_one_size_for_all_the_last_layer_to_settle_decides(tmp_path, dataset, settling_run):
    callback = waiting_callback({"calibration_batches": 8}, monitor_steps=4, settled_over=0.2, end=0.9)
    trainer = build_trainer(tmp_path, dataset, [callback], max_steps=60)
    trainer.train()
    (event,) = callback.history.events
    assert event.reasons == ["settled", "settled"] and trainer.model.config.state_size == 4
    assert settling_run[1].history.events[0].step < event.step < 54
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
def test_an_interrupted_run_cuts_at_the_same_steps(tmp_path, dataset, settling_run, place):
    trainer, callback = settling_run
    first, second = callback.history.steps
    step = {"before": first - 4, "at the first": first, "between": second - 4, "after": second + 4}[place]
    resumed, again = train_until_settled(tmp_path, dataset, f"{trainer.args.output_dir}/checkpoint-{step}", seed=1)
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


def test_the_files_hold_what_the_decision_rests_on(settling_run):
    trainer, callback = settling_run
    loaded = load_history(f"{trainer.args.output_dir}/checkpoint-60")
    assert loaded.to_dict() == callback.history.to_dict()
    scores = [seen.scores for seen in loaded.observations]
    assert scores[0][1].shape == (16,) and scores[-1] is None


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
