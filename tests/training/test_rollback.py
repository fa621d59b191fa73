"""Rollback: a cut that did harm is undone, and training goes on as if it had never been made."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import assert_identical, build_model, build_trainer, losses_of, weights_of
from torch.optim.swa_utils import AveragedModel
from trainer_callbacks import SnapshotAndRestore, WorseAt
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.storage.history import load_history
from hf_compressm.training.snapshot import Snapshot

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def cutting(config: dict | None = None, **schedule) -> CompreSSMCallback:
    schedule = {"start": 0.0, "end": 0.5, "events": 2, "rollback_tolerance": 0.05} | schedule  # of 20: after 5 and 10
    return CompreSSMCallback(CompreSSMConfig(**(config or {"cut_fraction": 0.5})), CompreSSMSchedule(**schedule))


def trainer_for(folder, dataset, callbacks, **options):
    return build_trainer(folder, dataset, callbacks, eval_dataset=dataset.select(range(16)), **(EVALUATING | options))


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_after_a_rollback_the_run_is_that_of_a_model_never_cut(tmp_path, dataset, storage, capsys):
    callback = cutting(rollback_storage=storage)
    rolled_back = trainer_for(tmp_path, dataset, [WorseAt(6), callback])
    rolled_back.train()
    never_cut = trainer_for(tmp_path, dataset, [SnapshotAndRestore(5, 6)])
    never_cut.train()

    assert_identical(weights_of(rolled_back.model), weights_of(never_cut.model))
    expected, losses = losses_of(never_cut), losses_of(rolled_back)
    assert [losses[step] for step in range(7, 21)] == [expected[step] for step in range(7, 21)]
    (event,) = callback.history.events
    assert (event.step, event.rolled_back_at, callback.history.state_sizes) == (5, 6, {0: 16, 1: 16})
    callback.history.events.append(replace(event, step=None, rolled_back_at=None))  # cut once more, after training
    assert callback.history.state_sizes == event.by_layer("state_sizes_after")
    assert "before the cut at step 5; back to state size 16" in capsys.readouterr().out
    assert not (tmp_path / "_rollback").exists()


def test_a_good_cut_stays_and_its_snapshot_is_let_go(tmp_path, dataset):
    callback = cutting({"target_state_size": 4}, rollback_storage="disk", rollback_patience=2)
    kept = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(sorted(path.name for path in (tmp_path / "_rollback").glob("step-*")))

    trainer_for(tmp_path, dataset, [callback, Watch()], save_strategy="steps", save_steps=2).train()
    assert callback.history.state_sizes == {0: 4, 1: 4} and callback.history.rollbacks == 0
    # Cuts after steps 5 and 10; evaluations after 6, 8 and 10, 12. What is seen at a step is before its evaluation.
    assert [bool(names) for names in kept] == [False] * 4 + [True] * 4 + [False] + [True] * 3 + [False] * 8
    assert kept[9] == ["step-10"]


def test_harm_that_shows_late_is_seen_within_the_patience_only(tmp_path, dataset):
    for patience, sizes in ((1, {0: 8, 1: 8}), (2, {0: 16, 1: 16})):
        callback = cutting(events=1, end=0.25, rollback_patience=patience)
        trainer_for(tmp_path, dataset, [WorseAt(8), callback]).train()
        assert callback.history.state_sizes == sizes


def test_a_later_cut_is_undone_alone_and_an_earlier_one_takes_it_along(tmp_path, dataset):
    options = {"start": 0.2, "end": 0.3, "events": 2, "rollback_patience": 3}  # after steps 5 and 6
    evaluating = {"eval_steps": 1}
    late = cutting(**options)
    trainer_for(tmp_path, dataset, [WorseAt(6, value=6.9), late], **evaluating).train()
    first = late.history.events[0]
    assert [event.rolled_back_at for event in late.history.events] == [6, 6]
    assert late.history.state_sizes == first.by_layer("state_sizes_before") == {0: 16, 1: 16}

    class FirstLooksBad(TrainerCallback):  # so that only the second cut exceeds what was before it
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            value = {4: 8.0, 5: 6.0, 6: 7.0}.get(state.global_step)
            if value is not None:
                metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = value

    second = cutting(**options)
    trainer_for(tmp_path, dataset, [FirstLooksBad(), second], **evaluating).train()
    assert [event.rolled_back_at for event in second.history.events] == [None, 6]
    assert second.history.state_sizes == {0: 8, 1: 8}


def test_after_a_rollback_cutting_stops_or_goes_half_as_deep(tmp_path, dataset):
    stopped, halved = cutting({"cut_fraction": 0.5}), cutting({"cut_fraction": 0.5}, on_rollback="halve")
    for callback in (stopped, halved):
        trainer_for(tmp_path, dataset, [WorseAt(6), callback]).train()
    assert [event.step for event in stopped.history.events] == [5]
    assert [event.state_sizes_after for event in halved.history.events] == [[8, 8], [12, 12]]
    assert halved.history.state_sizes == {0: 12, 1: 12}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tolerance": 0.04}, {"tolerance": 0.01}),
        ({"cut_fraction": 0.4}, {"cut_fraction": 0.1}),
        ({"loss_budget": 0.4}, {"loss_budget": 0.05}),  # two events left, half of it each
        ({"target_state_size": 1}, {"target_state_size": 12}),  # 16 → 1 in two: 4; a quarter of the logarithm: 11.3
    ],
)
def test_every_goal_can_be_halved(config, expected):
    halved = CompreSSMConfig(**config).for_event(16, 2, 0.0, halvings=2)
    assert {name: getattr(halved, name) for name in expected} == pytest.approx(expected)


def test_nan_is_harm(tmp_path, dataset):
    callback = cutting()
    trainer_for(tmp_path, dataset, [WorseAt(6, value=float("nan")), callback]).train()
    assert callback.history.events[0].rolled_back_at == 6


class NaNAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))


def test_a_run_that_diverged_after_its_cut_comes_back(tmp_path, dataset):
    callback = cutting()
    trainer = trainer_for(tmp_path, dataset, [callback, NaNAt(6)])
    trainer.train()
    assert callback.history.events[0].rolled_back_at == 6
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer.model).values())
    losses = losses_of(trainer)
    assert losses[20] < losses[1]


def test_a_metric_that_should_rise_is_watched_for_falling(tmp_path, dataset):
    callback = cutting()
    options = {"metric_for_best_model": "accuracy", "greater_is_better": True}
    trainer = trainer_for(tmp_path, dataset, [WorseAt(6, metric="eval_accuracy", value=0.2), callback], **options)
    trainer.compute_metrics = lambda prediction: {"accuracy": 0.5}
    trainer.train()
    assert callback.history.events[0].rolled_back_at == 6


def test_evaluations_after_training_undo_nothing(tmp_path, dataset):
    callback = cutting(start=0.5, end=1.0, events=1, rollback_patience=5)
    trainer = trainer_for(tmp_path, dataset, [callback], eval_steps=6)
    trainer.train()
    trainer.add_callback(WorseAt(20))
    trainer.evaluate()
    assert callback.history.state_sizes == {0: 8, 1: 8}


def test_a_checkpoint_of_the_rollback_step_holds_the_model_that_came_back(tmp_path, dataset):
    saving = {"save_strategy": "steps", "save_steps": 2}
    callback = cutting()
    trainer = trainer_for(tmp_path / "a", dataset, [WorseAt(6), callback], **saving)
    trainer.train()
    history = load_history(tmp_path / "a" / "checkpoint-6")
    assert history.state_sizes == {0: 16, 1: 16} and history.events[0].rolled_back_at == 6

    resumed_callback = cutting()
    resumed = trainer_for(tmp_path / "b", dataset, [resumed_callback], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert_identical(weights_of(resumed.model), weights_of(trainer.model))
    assert [event.step for event in resumed_callback.history.events] == [5]  # cutting has stopped


def test_a_run_resumed_while_a_cut_is_watched_can_still_undo_it_from_disk(tmp_path, dataset, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_for(tmp_path / "a", dataset, [WorseAt(6), cutting(rollback_storage="disk")], **saving)
    kept = tmp_path / "kept"

    class Killed(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 5:
                shutil.copytree(tmp_path / "a", kept)

    trainer.add_callback(Killed())
    trainer.train()
    resumed = trainer_for(kept, dataset, [WorseAt(6), cutting(rollback_storage="disk")], **saving)
    resumed.train(resume_from_checkpoint=str(kept / "checkpoint-5"))
    assert_identical(weights_of(resumed.model), weights_of(trainer.model))

    callback = cutting()
    in_memory = trainer_for(tmp_path / "c", dataset, [WorseAt(6), callback], **saving)
    in_memory.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert "cannot be undone" in caplog.text
    assert callback.history.events[0].rolled_back_at is None


class StopAt(TrainerCallback):
    """The process ends during this step, before anything is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_killed_after_a_rollback_comes_to_it_again(tmp_path, dataset):
    options = {"eval_steps": 3, "save_strategy": "steps", "save_steps": 5}  # undone at 6, killed at 8
    whole = trainer_for(tmp_path / "a", dataset, [WorseAt(6), cutting(rollback_storage="disk")], **options)
    whole.train()
    killed = trainer_for(tmp_path / "b", dataset, [WorseAt(6), cutting(rollback_storage="disk"), StopAt(8)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer_for(tmp_path / "b", dataset, [WorseAt(6), cutting(rollback_storage="disk")], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert_identical(weights_of(resumed.model), weights_of(whole.model))


def test_a_snapshot_of_another_run_is_not_taken_up(tmp_path, dataset, caplog):
    options = {"save_strategy": "steps", "save_steps": 5}
    first = trainer_for(tmp_path, dataset, [WorseAt(6), cutting(rollback_storage="disk")], **options)
    first.train()
    other = trainer_for(
        tmp_path, dataset, [cutting(rollback_storage="disk"), StopAt(6)], eval_steps=3, seed=9, learning_rate=1e-3
    )
    with pytest.raises(KeyboardInterrupt):
        other.train()
    assert list((tmp_path / "_rollback").iterdir())
    resumed = trainer_for(tmp_path, dataset, [WorseAt(6), cutting(rollback_storage="disk")], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert "no snapshot of that cut was found" in caplog.text


def test_the_companions_come_back_too(tmp_path, dataset):
    def run(folder, kind):
        model = build_model()
        average = AveragedModel(model)
        callback = cutting() if kind is cutting else None
        if callback:
            callback.companions = (average,)
        others = [WorseAt(6), callback] if callback else [kind(average)]

        class Averaging(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                average.update_parameters(model)

        trainer = build_trainer(
            folder, dataset, [*others, Averaging()], model=model, eval_dataset=dataset.select(range(16)), **EVALUATING
        )
        trainer.train()
        return weights_of(average)

    class WithAverage(SnapshotAndRestore):
        def __init__(self, average):
            super().__init__(5, 6)
            self.average = average

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == self.taken:
                self.snapshot = Snapshot(model, optimizer, companions=[self.average])

        def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == self.restored:
                before = int(self.average.n_averaged)
                self.snapshot.restore(model, optimizer, [self.average])
                assert int(self.average.n_averaged) == before - 2

    assert_identical(run(tmp_path / "a", cutting), run(tmp_path / "b", WithAverage))


def test_what_a_model_scored_that_was_taken_back_is_no_baseline(tmp_path, dataset):
    callback = cutting(start=0.2, end=0.3, events=2, on_rollback="halve")  # after steps 5 and 6
    worse = WorseAt(5, value=1e9)
    also_worse = WorseAt(6, 7, value=50.0)
    trainer_for(tmp_path, dataset, [worse, also_worse, callback], eval_steps=1).train()
    assert [event.rolled_back_at for event in callback.history.events] == [5, 6]
    assert callback.history.rollbacks == 2 and callback.history.state_sizes == {0: 16, 1: 16}


def test_a_cut_undone_later_leaves_the_record_of_one_undone_before(tmp_path, dataset):
    callback = cutting(start=0.2, end=0.3, events=2, rollback_patience=5)

    class Scores(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            value = {4: 6.0, 5: 3.0, 6: 5.0, 7: 9.0}.get(state.global_step)  # the second cut hurts, then the first
            if value is not None:
                metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = value

    trainer_for(tmp_path, dataset, [Scores(), callback], eval_steps=1).train()
    assert [event.rolled_back_at for event in callback.history.events] == [7, 6]
    assert callback.history.rollbacks == 2 and callback.history.state_sizes == {0: 16, 1: 16}


def test_several_evaluation_sets_need_the_name_of_a_metric(tmp_path, dataset):
    sets = {"a": dataset.select(range(8)), "b": dataset.select(range(8, 16))}

    def run(**options):
        callback = cutting()
        trainer = build_trainer(
            tmp_path, dataset, [WorseAt(6, metric="eval_b_loss"), callback], eval_dataset=sets, **EVALUATING, **options
        )
        trainer.train()
        return callback.history

    with pytest.raises(ValueError, match="no evaluation gave it; they gave .*eval_b_loss"):
        run()
    assert run(metric_for_best_model="b_loss").events[0].rolled_back_at == 6


def test_an_evaluation_after_an_interruption_undoes_nothing(tmp_path, dataset):
    callback = cutting()
    trainer = trainer_for(tmp_path, dataset, [WorseAt(7)], eval_steps=3)
    callback.attach(trainer)
    trainer.add_callback(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.evaluate()
    assert trainer.model.config.state_size == 8


def test_an_evaluation_repeated_at_the_start_of_a_resumed_run_counts_once(tmp_path, dataset):
    options = {"eval_steps": 2, "save_strategy": "steps", "save_steps": 6, "eval_on_start": True}
    patient = {"rollback_storage": "disk", "rollback_patience": 2}
    resumed = cutting(**patient)
    killed = trainer_for(tmp_path, dataset, [cutting(**patient), StopAt(7)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer_for(tmp_path, dataset, [WorseAt(8), resumed], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.history.events[0].rolled_back_at == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_steps": 2, "eval_delay": 5}, "the first evaluation after step 6"),
        ({"eval_strategy": "epoch", "eval_delay": 1, "per_device_train_batch_size": 700}, "evaluation after step 5"),
        ({"eval_strategy": "no"}, "rollback_tolerance needs evaluations"),
        ({"eval_steps": 5}, "first cut is due after step 5 and the first evaluation after step 5"),
        ({"eval_strategy": "epoch"}, "set eval_on_start=True"),
    ],
)
def test_a_rollback_without_a_baseline_is_refused_before_training(tmp_path, dataset, options, message):
    callback = cutting({"cut_fraction": 0.5, "calibration_batches": 2})
    trainer = trainer_for(tmp_path, dataset, [callback], **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "options", [{"eval_on_start": True, "eval_steps": 5}, {"eval_strategy": "epoch", "eval_steps": None}]
)
def test_an_evaluation_at_the_start_or_an_epoch_before_is_a_baseline(tmp_path, dataset, options):
    data = dataset.select(range(24)) if "eval_on_start" not in options else dataset  # epochs of three steps
    callback = cutting({"cut_fraction": 0.5, "calibration_batches": 2})
    trainer_for(tmp_path, data, [callback], **options).train()
    assert callback.history.state_sizes == {0: 4, 1: 4}


def test_the_snapshot_holds_what_was_trained(tmp_path, trained):
    model, optimizer = trained
    weights = weights_of(model)
    moments = {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }
    for folder in (None, tmp_path):
        snapshot = Snapshot(model, optimizer, folder)
        other = build_model(seed=5, state_size=6)
        fresh = torch.optim.AdamW(other.parameters(), lr=1.0)
        snapshot.restore(other, fresh)
        assert_identical(weights_of(other), weights)
        for name, parameter in other.named_parameters():
            assert_identical(fresh.state[parameter], moments[name])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        snapshot.restore(model, optimizer)
