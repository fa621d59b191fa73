"""`attach`: a Trainer whose model takes the state size of whatever is loaded into it, in any order of construction."""

import json

import pytest
import torch
from conftest import assert_identical, build_model, build_trainer, losses_of, weights_of
from torch.optim.swa_utils import AveragedModel
from trainer_callbacks import WorseAt, cutting_callback
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan
from hf_compressm.architectures import state_sizes
from hf_compressm.sharing.pictures import PICTURES
from hf_compressm.storage.checkpoint import check_complete, last_complete_checkpoint
from hf_compressm.storage.history import load_history
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes

SAVING = {"save_strategy": "steps", "save_steps": 4}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def given_to_the_constructor(build, callback):
    return build([callback])


def given_and_attached(build, callback):
    trainer = build([callback])
    callback.attach(trainer)
    return trainer


def attached_only(build, callback):
    trainer = build([])
    callback.attach(trainer)
    return trainer


def added_and_attached(build, callback):
    trainer = build([])
    trainer.add_callback(callback)
    callback.attach(trainer)
    return trainer


def attached_and_added(build, callback):
    trainer = build([])
    callback.attach(trainer)
    callback.attach(trainer)
    trainer.add_callback(callback)
    return trainer


ORDERS = [given_to_the_constructor, given_and_attached, attached_only, added_and_attached, attached_and_added]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, dataset):
    """(folder, losses, weights) of a whole run that saves."""
    install_scan()
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = build_trainer(folder, dataset, [cutting_callback()], **SAVING)
    trainer.train()
    return folder, losses_of(trainer), weights_of(trainer.model)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_construction_cuts_once_and_resumes_exactly(tmp_path, dataset, uninterrupted, order):
    folder, losses, weights = uninterrupted
    callback = cutting_callback()
    trainer = order(lambda callbacks: build_trainer(tmp_path / "a", dataset, callbacks), callback)
    trainer.train()
    assert losses_of(trainer) == losses
    assert [event.step for event in callback.history.events] == [5, 10]

    def build(callbacks):
        return build_trainer(tmp_path / "b", dataset, callbacks, model=build_model(seed=1))

    resumed = order(build, cutting_callback())
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_identical(weights_of(resumed.model), weights)


def test_a_trainer_stays_what_it_was(tmp_path, dataset):
    class OwnTrainer(Trainer):
        def create_optimizer(self, *args, **kwargs):
            self.created = True
            return super().create_optimizer(*args, **kwargs)

    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=6, use_cpu=True, save_strategy="no")
    trainer = OwnTrainer(build_model(), arguments, train_dataset=dataset, data_collator=default_data_collator)
    CompreSSMCallback(CompreSSMConfig(target_state_size=4), CompreSSMSchedule(end=0.5, events=1)).attach(trainer)
    trainer.train()
    assert isinstance(trainer, OwnTrainer) and type(trainer).__name__ == "OwnTrainer" and trainer.created
    assert trainer.model.config.state_size == 4


def test_two_callbacks_are_refused(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()])
    with pytest.raises(ValueError, match="the trainer has another CompreSSMCallback"):
        cutting_callback().attach(trainer)
    trainer = build_trainer(tmp_path, dataset)
    cutting_callback().attach(trainer)
    with pytest.raises(ValueError, match="the trainer has another CompreSSMCallback"):
        cutting_callback().attach(trainer)


def best_run(folder, dataset, best_at: int, attach: bool = True) -> tuple[Trainer, CompreSSMCallback]:
    worse = WorseAt(*(step for step in range(2, 21, 2) if step != best_at))
    callback = cutting_callback()
    trainer = build_trainer(
        folder, dataset, [worse, callback], eval_dataset=dataset.select(range(16)), load_best_model_at_end=True, **BEST
    )
    if attach:
        callback.attach(trainer)
    return trainer, callback


@pytest.mark.parametrize(("best_at", "size", "events"), [(2, 16, 0), (6, 8, 1), (14, 4, 2)])
def test_the_best_model_at_the_end_has_its_own_state_size_and_trains_on(tmp_path, dataset, best_at, size, events):
    trainer, callback = best_run(tmp_path, dataset, best_at)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best_at}")
    assert trainer.model.config.state_size == size and len(callback.history.events) == events
    best = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{best_at}")
    assert_identical(weights_of(trainer.model), weights_of(best))

    trainer.args.load_best_model_at_end = False
    trainer.train()
    after = weights_of(trainer.model)
    assert trainer.model.config.state_size == 4
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.model.parameters()} == optimized
    if size == 4:
        for name in ("A_log", "x_proj.weight"):
            name = f"backbone.layers.0.mixer.{name}"
            assert not torch.equal(after[name], best.state_dict()[name])


def test_without_attach_the_best_model_is_refused_before_training(tmp_path, dataset):
    trainer, _ = best_run(tmp_path, dataset, 6, attach=False)
    with pytest.raises(ValueError, match=r"Call callback.attach\(trainer\) after building the Trainer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_made_by_model_init_resumes_at_the_size_of_the_checkpoint(tmp_path, dataset):
    def train(folder, resume_from=None):
        arguments = build_trainer(folder, dataset, **SAVING).args
        trainer = Trainer(
            model_init=lambda: build_model(),
            args=arguments,
            train_dataset=dataset,
            data_collator=default_data_collator,
        )
        cutting_callback().attach(trainer)
        trainer.train(resume_from_checkpoint=resume_from)
        return weights_of(trainer.model)

    weights = train(tmp_path / "a")
    assert weights["backbone.layers.0.mixer.A_log"].shape[1] == 4
    assert_identical(train(tmp_path / "b", str(tmp_path / "a" / "checkpoint-12")), weights)


def test_a_callback_that_trainer_rebuilds_from_its_state_is_attached_again(tmp_path, dataset, uninterrupted):
    folder, _, weights = uninterrupted
    options = {"restore_callback_states_from_checkpoint": True, "load_best_model_at_end": True}
    trainer = build_trainer(tmp_path, dataset, eval_dataset=dataset.select(range(16)), **(BEST | options))
    cutting_callback().attach(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, CompreSSMCallback))
    assert callback.trainer is trainer and [event.step for event in callback.history.events] == [5, 10]
    assert_identical(weights_of(trainer.model), weights)


def test_resuming_from_the_last_checkpoint_passes_over_one_that_was_not_finished(
    tmp_path, dataset, uninterrupted, caplog
):
    _, _, weights = uninterrupted
    build_trainer(tmp_path, dataset, [cutting_callback()], **SAVING).train()
    for step in (20, 16):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    resumed = build_trainer(tmp_path, dataset, model=build_model(seed=1), **SAVING)
    cutting_callback().attach(resumed)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-16 has no trainer_state.json: it was not written to its"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-20 has no trainer_state.json" in caplog.text
    assert "checkpoint-16 has no trainer_state.json" in caplog.text
    assert_identical(weights_of(resumed.model), weights)


@pytest.mark.parametrize("file", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_damaged_file_of_a_checkpoint_is_named_before_training(tmp_path, dataset, file, kept):
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()], max_steps=8, **SAVING)
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    check_complete(folder)
    (damaged,) = [path for path in folder.iterdir() if path.name.startswith(file)]
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(len(content) * kept)])
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").iterdir()}
    resumed = build_trainer(tmp_path, dataset, **SAVING)
    cutting_callback().attach(resumed)
    with pytest.raises(ValueError, match=f"{damaged.name} is truncated or damaged"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").iterdir()} == before


def test_foreign_files_in_a_checkpoint_are_not_judged_and_missing_ones_are_named(tmp_path, dataset):
    build_trainer(tmp_path, dataset, [cutting_callback()], max_steps=8, **SAVING).train()
    folder = tmp_path / "checkpoint-8"
    (folder / "additional_chat_templates").mkdir()
    (folder / "notes.bin").write_bytes(b"mine")
    check_complete(folder)

    optimizer = folder / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    optimizer.unlink()
    with pytest.raises(FileNotFoundError, match="no state of the optimizer"):
        check_complete(folder)
    content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
    optimizer.write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer.pt is truncated or damaged"):
        check_complete(folder)
    (folder / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(FileNotFoundError, match="pytorch_model_fsdp_0 has no .metadata"):
        check_complete(folder)
    (folder / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"trainer_state.json is damaged"):
        check_complete(folder)

    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-4 has no weights"):
        check_complete(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        check_complete(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path) is None


def test_a_callback_belongs_to_one_trainer(tmp_path, dataset):
    callback = cutting_callback()
    callback.attach(build_trainer(tmp_path / "a", dataset))
    other = build_trainer(tmp_path / "b", dataset, [callback])
    with pytest.raises(ValueError, match="attached to another trainer"):
        other.train()


def test_a_callback_removed_and_attached_again_cuts(tmp_path, dataset):
    callback = cutting_callback()
    trainer = build_trainer(tmp_path, dataset)
    callback.attach(trainer)
    trainer.remove_callback(callback)
    other = cutting_callback()
    other.attach(trainer)
    trainer.train()
    assert trainer.model.config.state_size == 4 and not callback.history.events


def test_a_calibration_loader_over_a_stream_is_taken(tmp_path, dataset, batches):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    trainer = build_trainer(tmp_path, dataset, [cutting_callback(calibration_loader=loader)])
    trainer.train()
    assert trainer.model.config.state_size == 4


def test_a_history_that_contradicts_the_weights_is_refused(tmp_path, dataset):
    build_trainer(tmp_path, dataset, [cutting_callback()], max_steps=20, **SAVING).train()
    path = tmp_path / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    exported = state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["exported_history"]
    exported["events"][-1] |= {"state_sizes_after": [7, 7], "kept_states": [list(range(7))] * 2}
    path.write_text(json.dumps(state))
    resumed = build_trainer(tmp_path, dataset, **SAVING)
    cutting_callback().attach(resumed)
    with pytest.raises(ValueError, match=r"history ends with state sizes {0: 7, 1: 7}, its weights have {0: 8, 1: 8}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


class Averaging(TrainerCallback):
    """A running average of the weights, as a user would keep one."""

    def __init__(self, model):
        self.average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


def test_a_running_average_follows_the_cuts(tmp_path, dataset):
    model = build_model()
    averaging = Averaging(model)
    callback = cutting_callback(companions=[averaging.average])
    build_trainer(tmp_path, dataset, [callback, averaging], model=model).train()
    average = averaging.average.module
    assert average.config.state_size == 4
    left, right = weights_of(average), weights_of(model)
    assert all(left[name].shape == right[name].shape for name in right)
    assert not torch.equal(left["backbone.layers.0.mixer.A_log"], right["backbone.layers.0.mixer.A_log"])


def test_a_companion_of_another_size_is_refused_before_training(tmp_path, dataset):
    companion = build_model(state_size=8)
    trainer = build_trainer(tmp_path, dataset, [cutting_callback(companions=[companion])])
    with pytest.raises(ValueError, match="a companion has state sizes"):
        trainer.train()
    adopt_checkpoint_sizes(companion)
    companion.load_state_dict(build_model().state_dict())  # the remedy that the message names
    trainer.train()
    assert companion.config.state_size == 4


def test_the_log_says_what_was_cut_and_the_folder_shows_it(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, **SAVING)
    callback = cutting_callback()
    callback.attach(trainer)
    trainer.train()
    trainer.save_model()
    entries = [entry for entry in trainer.state.log_history if "compressm/state_size" in entry]
    assert [entry["step"] for entry in entries] == callback.history.steps
    for entry, event in zip(entries, callback.history.events, strict=True):
        assert entry["compressm/state_size"] == event.state_sizes_after[0]
        assert entry["compressm/loss_after_cut"] == event.loss_after
    assert list(losses_of(trainer)) == list(
        range(1, trainer.state.global_step + 1)
    )  # no log of the loss was displaced
    config = json.loads((tmp_path / "config.json").read_text())["compressm"]
    assert config == callback.history.summary() and config["state_sizes_after"] == trainer_sizes(trainer)
    assert load_history(tmp_path).to_dict() == callback.history.to_dict()
    drawn = set(PICTURES) - {"settling.png"}  # rankings were not compared
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def trainer_sizes(trainer) -> list[int]:
    return list(state_sizes(trainer.model).values())
