"""A training that could not be followed is refused before its first step, with an error that names the remedy."""

import re

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from conftest import build_model, build_trainer
from trainer_callbacks import cutting_callback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress

TARGET = CompreSSMConfig(target_state_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -0.1}, "start = -0.1"),
        ({"start": 0.5, "end": 0.5}, "end = 0.5; allowed: a fraction of the run, in (start = 0.5, 1]"),
        ({"end": 1.1}, "end = 1.1"),
        ({"events": 0}, "events = 0"),
        ({"monitor_steps": 0}, "monitor_steps = 0"),
    ],
)
def test_a_schedule_is_checked_when_it_is_built(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CompreSSMSchedule(**options)


def test_a_window_too_short_for_its_events_is_refused_before_training(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, [CompreSSMCallback(TARGET)])
    with pytest.raises(ValueError, match="4 cuts do not fit between 0% and 10% of 20 steps"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_too_little_training_data_to_calibrate_on_is_refused_before_training(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset.select(range(20)), [cutting_callback()])
    with pytest.raises(ValueError, match="ended after 2 batches, 4 are needed"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_masters_are_refused_in_training(tmp_path, dataset, batches, dtype):
    model = build_model().to(dtype)
    with pytest.raises(ValueError, match=f"is trained in {dtype}.*Keep the weights in float32"):
        compress(model, analyze(model, batches, TARGET), torch.optim.AdamW(model.parameters()))
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()], model=model)
    with pytest.raises(ValueError, match="Keep the weights in float32"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_options_that_a_resize_would_break_are_refused_before_training(tmp_path, dataset, options, message):
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()], **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("version", "attached", "message"),
    [
        ("2", False, r"FSDP loads a checkpoint .* Call callback.attach\(trainer\)"),
        ("2", True, "FSDP was asked for, but the model is not sharded"),
        ("1", True, "FSDP1 was asked for. Set fsdp_config's version to 2"),
    ],
)
def test_fsdp_that_could_not_be_followed_is_refused(tmp_path, dataset, monkeypatch, version, attached, message):
    trainer, callback = build_trainer(tmp_path, dataset), cutting_callback()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch sets them
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match=message):
        callback.attach(trainer) if attached else trainer.add_callback(callback)
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("engine", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_other_engines_are_refused_as_soon_as_they_are_known(tmp_path, dataset, monkeypatch, engine):
    trainer = build_trainer(tmp_path, dataset)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", engine)
    with pytest.raises(
        ValueError, match=f"the engine '{engine.value}' was asked for. Use one process, or Distributed"
    ):
        cutting_callback().attach(trainer)


def test_a_layer_wise_optimizer_is_refused_before_training(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()])
    trainer.optimizer = LayerWiseDummyOptimizer()
    with pytest.raises(ValueError, match="LayerWiseDummyOptimizer"):
        trainer.train()


def test_a_second_callback_is_refused_before_training(tmp_path, dataset):
    callbacks = [cutting_callback(), cutting_callback()]
    with pytest.raises(ValueError, match="2 CompreSSMCallbacks would each cut the same model"):
        build_trainer(tmp_path, dataset, callbacks).train()


def test_calibration_data_that_can_be_read_only_once_is_refused(tmp_path, batches):
    with pytest.raises(ValueError, match="calibration_loader can be read only once"):
        cutting_callback(calibration_loader=iter(batches))

    class OneShot(torch.utils.data.IterableDataset):
        examples = ({"input_ids": row} for batch in batches for row in batch["input_ids"])

        def __iter__(self):
            return self.examples

    trainer = build_trainer(tmp_path, OneShot(), [cutting_callback()])
    with pytest.raises(ValueError, match="Calibration would disturb training. Give the callback a calibration_loader"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_restored_callback_that_lost_its_loader_is_refused(tmp_path, dataset, batches):
    options = {"save_strategy": "steps", "save_steps": 10, "restore_callback_states_from_checkpoint": True}
    callback = cutting_callback(calibration_loader=batches)
    build_trainer(tmp_path, dataset, [callback], **options).train()
    trainer = build_trainer(tmp_path, dataset, [callback], **options)
    with pytest.raises(ValueError, match="rebuilds the callback without its calibration_loader"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_an_optimizer_made_before_a_resume_changed_the_sizes_is_refused(tmp_path, dataset):
    callback = cutting_callback()
    build_trainer(tmp_path, dataset, [callback], save_strategy="steps", save_steps=10).train()
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()])
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="does not hold layer 0 x_proj.weight"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
