"""Real Trainer runs: the callback disturbs nothing, cuts on schedule, writes its history and resumes exactly."""

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_identical, build_model, build_trainer, losses_of, random_state, weights_of
from datasets import Dataset
from processes import run_program
from safetensors.torch import load_file
from trainer_callbacks import SCHEDULE, cutting_callback
from transformers import AutoModelForCausalLM, MambaForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan, uninstall_scan
from hf_compressm.storage.history import load_history
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes
from hf_compressm.training import start_checks


@pytest.mark.parametrize("criterion", ["output", "taylor"])
def test_a_callback_that_never_cuts_leaves_the_run_bit_identical(tmp_path, dataset, criterion):
    small = dataset.select(range(88))  # two epochs
    plain = build_trainer(tmp_path, small)
    plain.train()
    plain_random_state = random_state()
    callback = CompreSSMCallback(CompreSSMConfig(tolerance=1e-9, criterion=criterion), SCHEDULE)
    watched = build_trainer(tmp_path, small, [callback])
    watched.train()

    assert random_state() == plain_random_state
    assert [event.is_cut for event in callback.history.events] == [False, False]
    assert losses_of(watched) == losses_of(plain)
    assert_identical(weights_of(watched.model), weights_of(plain.model))


@pytest.mark.parametrize("goal, start, warned", [("loss_budget", 0, 1), ("loss_budget", 0.3, 0), ("tolerance", 0, 0)])
def test_an_early_loss_budget_is_warned_of(tmp_path, dataset, monkeypatch, goal, start, warned):
    """The README's study of recall: what is not learned yet costs nothing, and the budget takes it all."""
    warnings = []
    monkeypatch.setattr(start_checks.logger, "warning", lambda text, *args: warnings.append(text))
    schedule = CompreSSMSchedule(start=start, end=start + 0.2, events=1)  # of 20 steps
    callback = CompreSSMCallback(CompreSSMConfig(**{goal: 1e-9}), schedule)
    build_trainer(tmp_path, dataset, [callback]).train()
    assert ["A loss budget may be spent from step 4 of 20" in text for text in warnings] == [True] * warned


def test_a_run_cuts_at_its_steps_and_says_so(tmp_path, dataset, capsys):
    callback = cutting_callback()
    trainer = build_trainer(tmp_path, dataset, [callback])
    trainer.train()
    assert [(event.step, event.state_sizes_after) for event in callback.history.events] == [(5, [8, 8]), (10, [4, 4])]
    assert trainer.model.config.state_size == 4
    printed = capsys.readouterr().out
    assert "CompreSSM, step 5 of 20: state size 16 → 8" in printed
    assert "score discarded" in printed and "measured loss" in printed
    losses = losses_of(trainer)
    assert losses[20] < losses[10] < losses[1]


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 3}, {"activation_checkpointing": True}, {"bf16": True}]
)
@pytest.mark.parametrize("criterion", ["output", "taylor"])
def test_cuts_work_with(tmp_path, dataset, options, criterion):
    trainer = build_trainer(tmp_path, dataset, [cutting_callback(criterion=criterion)], **options)
    trainer.train()
    assert trainer.model.config.state_size == 4
    assert losses_of(trainer)[20] < losses_of(trainer)[1]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_refitted_cuts_go_on_learning_and_resume_exactly(tmp_path, dataset, learned):
    def prepared():
        model = build_model()
        model.load_state_dict(learned)
        callback = cutting_callback(refit=True, calibration_batches=3, target_state_size=2)
        options = {"save_strategy": "steps", "save_steps": 7, "learning_rate": 1e-4}
        return build_trainer(tmp_path, dataset, [callback], model=model, **options), callback

    (run, callback), (resumed, _) = prepared(), prepared()
    run.train()
    assert [event.refit for event in callback.history.events] == [True, True]
    assert load_history(tmp_path / "checkpoint-14").summary()["refit"] is True
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_identical(weights_of(resumed.model), weights_of(run.model))


def largest_rows(layer) -> torch.Tensor:
    return layer.C_rows.norm(dim=1)


def test_a_criterion_of_ones_own_is_written_by_name_and_resumed(tmp_path, dataset, caplog):
    options = {"save_strategy": "steps", "save_steps": 4}
    run, resumed = (
        build_trainer(tmp_path, dataset, [cutting_callback(criterion=largest_rows)], **options) for _ in range(2)
    )
    run.train()
    history = load_history(tmp_path / "checkpoint-8")
    assert history.config["criterion"] == history.events[0].criterion == "largest_rows"
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_identical(weights_of(resumed.model), weights_of(run.model))
    assert "another configuration" not in caplog.text
    resumed.args.restore_callback_states_from_checkpoint = True
    with pytest.raises(ValueError, match="only its name was kept: .*leave restore_callback_states_from_checkpoint at"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "adam_epsilon": 1e-6, "max_steps": 12}


def test_a_compiled_run_is_the_eager_one(tmp_path, dataset):
    runs = [
        build_trainer(tmp_path, dataset, [cutting_callback()], **(COMPILED | {"torch_compile": compiled}))
        for compiled in (False, True)
    ]
    for run in runs:
        run.train()
    assert hasattr(runs[1].model_wrapped, "_orig_mod") and runs[1].model.config.state_size == 4
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), abs=1e-5)
    left, right = (weights_of(run.model) for run in runs)
    assert max((left[name] - right[name]).abs().max() for name in left) < 1e-5


@pytest.mark.slow
def test_compiled_code_survives_more_sizes_than_dynamo_would_recompile_for(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    callback = CompreSSMCallback(CompreSSMConfig(target_state_size=4), CompreSSMSchedule(end=1.0, events=11))
    build_trainer(tmp_path, dataset, [callback], **COMPILED).train()
    sizes = {tuple(event.state_sizes_after) for event in callback.history.events}
    assert len(sizes) > torch._dynamo.config.recompile_limit


@pytest.fixture(
    scope="module",
    params=[{}, {"restore_callback_states_from_checkpoint": True}, {"gradient_accumulation_steps": 2}],
)
def uninterrupted(request, tmp_path_factory, dataset):
    """(trainer after its run, its data, its options); every step has left a checkpoint."""
    install_scan()
    options = request.param | {"save_strategy": "steps", "save_steps": 1}
    dataset = dataset.select(range(120))  # several epochs
    trainer = build_trainer(tmp_path_factory.mktemp("run"), dataset, [cutting_callback()], **options)
    trainer.train()
    return trainer, dataset, options


@pytest.mark.parametrize("checkpoint", [4, 5, 8, 12])  # before, at, between and after the cuts
def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(uninterrupted, tmp_path, checkpoint):
    whole, dataset, options = uninterrupted
    folder = Path(whole.args.output_dir)
    resumed = build_trainer(tmp_path, dataset, [cutting_callback()], model=build_model(seed=1), **options)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}"))
    assert losses_of(resumed) == losses_of(whole)
    assert_identical(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.model.config.state_size == 4

    histories = [load_history(run / "checkpoint-20") for run in (folder, tmp_path)]
    for left, right in zip(*(history.events for history in histories), strict=True):
        assert (left.step, left.kept_states, left.loss_after) == (right.step, right.kept_states, right.loss_after)


def test_a_loss_budget_holds_over_a_run_with_several_cuts_and_a_resume(tmp_path, dataset, learned):
    class Recording(CompreSSMConfig):
        def for_event(self, state_size, events_left, loss_spent, halvings=0):
            spent.append((events_left, loss_spent))
            return super().for_event(state_size, events_left, loss_spent, halvings)

    def train(checkpoint=None):
        goal = {"loss_budget": 0.0015, "min_reduction": 0.0, "criterion": "random", "compensate": False}
        callback = CompreSSMCallback(Recording(**goal), SCHEDULE)
        model = build_model()
        model.load_state_dict(learned)
        options = {"learning_rate": 1e-6, "save_strategy": "steps", "save_steps": 7}
        trainer = build_trainer(tmp_path, dataset, [callback], model=model, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model, callback.history

    spent = []
    model, history = train()
    rises = [max(0.0, event.loss_after - event.loss_before) for event in history.events]
    assert rises[0] > 0 and sum(rises) == history.loss_spent <= 0.0015
    assert spent == [(2, 0.0), (1, rises[0])]
    assert all(event.measuring_seconds < event.seconds for event in history.events)

    spent = []
    resumed_model, resumed_history = train(str(tmp_path / "checkpoint-7"))
    assert spent == [(1, rises[0])]
    assert resumed_history.loss_spent == history.loss_spent
    assert_identical(weights_of(resumed_model), weights_of(model))


def test_weights_in_shards_are_adopted_in_any_order():
    small = build_model(state_size=5)
    weights = small.state_dict()
    model = build_model()
    adopt_checkpoint_sizes(model)
    for name in sorted(weights, key=lambda name: "A_log" in name):  # x_proj before A_log, one tensor a shard
        model.load_state_dict({name: weights[name]}, strict=False)
    assert model.config.state_size == 5
    assert_identical(weights_of(model), weights_of(small))


def test_a_run_resumed_from_a_checkpoint_of_another_schedule_says_so(tmp_path, dataset, caplog):
    build_trainer(tmp_path, dataset, save_strategy="steps", save_steps=8).train()
    callback = cutting_callback()
    trainer = build_trainer(tmp_path, dataset, [callback], save_strategy="steps", save_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "By step 8 cuts were due after steps [5]; the history has them at []" in caplog.text
    assert trainer.model.config.state_size == 4
    assert [event.step for event in callback.history.events] == [10]


def test_batches_without_a_token_to_predict_are_passed_over(tmp_path, dataset):
    silent = [{"input_ids": row["input_ids"], "labels": [-100] * 32} for row in dataset.select(range(60))]
    mixed = Dataset.from_list([*silent, *dataset.select(range(60))])
    callback = cutting_callback(calibration_batches=20)
    build_trainer(tmp_path, mixed, [callback], per_device_train_batch_size=1).train()
    assert len(callback.history.events) == 2


def test_a_resume_in_a_new_process_repeats_the_run_exactly(tmp_path, dataset):
    callback = cutting_callback()
    trainer = build_trainer(tmp_path / "a", dataset, [callback], save_strategy="steps", save_steps=7)
    trainer.train()
    dataset.save_to_disk(tmp_path / "data")
    script = f"""
import json, sys
from datasets import load_from_disk
from conftest import build_model, build_trainer, losses_of
from trainer_callbacks import cutting_callback
from hf_compressm import install_scan
install_scan()
trainer = build_trainer({str(tmp_path / "b")!r}, load_from_disk({str(tmp_path / "data")!r}), [cutting_callback()],
                        model=build_model(seed=3), save_strategy="steps", save_steps=7)
trainer.train(resume_from_checkpoint={str(tmp_path / "a" / "checkpoint-14")!r})
print(json.dumps(losses_of(trainer)))
"""
    output = run_program(script).stdout
    assert json.loads(output.splitlines()[-1]) == {str(step): loss for step, loss in losses_of(trainer).items()}


def test_every_checkpoint_is_a_plain_mamba_with_its_history_beside_it(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()], save_strategy="steps", save_steps=4)
    trainer.train()
    for step, size, events in ((4, 16, 0), (8, 8, 1), (12, 4, 2), (20, 4, 2)):
        folder = tmp_path / f"checkpoint-{step}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is MambaForCausalLM and model.config.state_size == size
        assert len(json.loads((folder / "compressm.json").read_text())["events"]) == events
        assert sorted(load_file(folder / "hsv.safetensors")) == [
            f"event.{event}.layer.{layer}" for event in range(events) for layer in range(2)
        ]
    assert_identical(weights_of(model), weights_of(trainer.model))


def test_a_history_written_and_read_is_the_same(tmp_path, dataset):
    callback = cutting_callback()
    build_trainer(tmp_path, dataset, [callback], save_strategy="steps", save_steps=20).train()
    history = load_history(tmp_path / "checkpoint-20")
    assert history.to_dict() == callback.history.to_dict()
    for event in history.events:
        for spectrum, size in zip(event.hankel_singular_values, event.state_sizes_before, strict=True):
            assert spectrum.shape == (size,) and (spectrum.diff() <= 0).all() and spectrum[-1] >= 0


def test_the_callback_added_after_construction_cuts_too(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, save_strategy="steps", save_steps=20)
    trainer.add_callback(cutting_callback())
    trainer.train()
    assert trainer.model.config.state_size == 4


def test_a_second_training_goes_on_from_the_cut_model(tmp_path, dataset):
    callback = cutting_callback()
    trainer = build_trainer(tmp_path, dataset, [callback])
    trainer.train()
    weights = weights_of(trainer.model)
    trainer.train()
    assert trainer.model.config.state_size == 4
    moved = {name: not torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items()}
    assert all(moved.values()), moved


def test_a_stream_is_calibrated_on_its_first_batches_and_not_disturbed(tmp_path, blocks):
    def stream():
        for block in blocks.tolist():
            yield {"input_ids": block, "labels": block}

    from datasets import IterableDataset

    plain = build_trainer(tmp_path, IterableDataset.from_generator(stream))
    plain.train()
    never = CompreSSMCallback(CompreSSMConfig(tolerance=1e-9), SCHEDULE)
    watched = build_trainer(tmp_path, IterableDataset.from_generator(stream), [never])
    watched.train()
    assert losses_of(watched) == losses_of(plain)
    assert len(never.history.events) == 2

    cut = build_trainer(tmp_path, IterableDataset.from_generator(stream), [cutting_callback()])
    cut.train()
    assert cut.model.config.state_size == 4


def test_a_calibration_loader_of_ones_own_is_used_and_training_data_is_not(tmp_path, dataset, batches):
    class Counting(list):
        readings = 0

        def __iter__(self):
            Counting.readings += 1
            return super().__iter__()

    callback = CompreSSMCallback(CompreSSMConfig(target_state_size=4), SCHEDULE, calibration_loader=Counting(batches))
    build_trainer(tmp_path, dataset, [callback]).train()
    assert Counting.readings == 3  # once to check, twice to cut


def test_the_slow_loop_is_announced_once_before_it_runs(tmp_path, dataset, caplog):
    uninstall_scan()
    short = dataset.map(lambda row: {"input_ids": row["input_ids"][:4], "labels": row["labels"][:4]})
    build_trainer(tmp_path, short, [cutting_callback()]).train()
    assert sum("hf_compressm.install_scan()" in record.message for record in caplog.records) == 1


def test_padded_batches_with_a_mask_are_calibrated_on_their_tokens_only(tmp_path, blocks):
    rows = []
    for i, block in enumerate(blocks[:200].tolist()):
        length = 12 + i % 20
        rows.append(
            {
                "input_ids": block[:length] + [0] * (32 - length),
                "attention_mask": [1] * length + [0] * (32 - length),
                "labels": block[:length] + [-100] * (32 - length),
            }
        )
    callback = cutting_callback()
    build_trainer(tmp_path, Dataset.from_list(rows), [callback]).train()
    # of 32 positions the 16th and the last are read, one of which is a token in the longer rows
    assert all(0 < event.tokens <= 4 * 8 for event in callback.history.events)
