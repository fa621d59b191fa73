"""Bad input gets one error that names the value and the remedy, before anything is changed."""

import json
import re

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from conftest import LAYERS, assert_identical, build_model, build_trainer, weights_of
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import load_history

TARGET = CompreSSMConfig(target_state_size=4)
SCHEDULE = CompreSSMSchedule(end=0.5, events=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of tolerance, target_state_size, loss_budget, cut_fraction; got none"),
        ({"tolerance": 0.1, "loss_budget": 0.1}, "got tolerance, loss_budget"),
        ({"tolerance": 0.0}, "tolerance = 0.0; allowed: a share in (0, 1)"),
        ({"tolerance": 1.0}, "tolerance = 1.0"),
        ({"tolerance": float("nan")}, "tolerance = nan"),
        ({"cut_fraction": 1.5}, "cut_fraction = 1.5"),
        ({"loss_budget": 0.0}, "loss_budget = 0.0"),
        ({"loss_budget": float("inf")}, "loss_budget = inf"),
        ({"target_state_size": 0}, "target_state_size = 0; allowed: a whole number, at least 1"),
        ({"target_state_size": 4.0}, "target_state_size = 4.0"),
        ({"target_state_size": 4, "min_state_size": 8}, "target_state_size = 4; allowed: ≥ min_state_size = 8"),
        ({"target_state_size": 12, "multiple_of": 8}, "target_state_size = 12; allowed: a multiple of 8"),
        ({"tolerance": 0.1, "criterion": "best"}, "criterion = 'best'; allowed: one of output, second_moment"),
        ({"tolerance": 0.1, "allocation": "best"}, "allocation = 'best'; allowed: one of uniform, per_layer"),
        ({"tolerance": 0.1, "selection": "best"}, "selection = 'best'; allowed: one of largest, smallest, random"),
        ({"tolerance": 0.1, "skip_layers": [0], "allocation": "uniform"}, "skip_layers = [0]; allowed: empty"),
        ({"tolerance": 0.1, "calibration_batches": 1}, "calibration_batches = 1; allowed: a whole number, at least 2"),
        ({"tolerance": 0.1, "min_reduction": 1.0}, "min_reduction = 1.0"),
        ({"tolerance": 0.1, "multiple_of": 0}, "multiple_of = 0"),
    ],
)
def test_a_configuration_is_checked_when_it_is_built(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CompreSSMConfig(**options)


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


def test_a_target_above_the_state_size_is_refused(tmp_path, dataset, batches):
    config = CompreSSMConfig(target_state_size=32)
    with pytest.raises(ValueError, match=r"target_state_size = 32 is above the model's 16 states; give 1 … 16"):
        analyze(build_model(), batches, config)
    with pytest.raises(ValueError, match="target_state_size = 32"):
        build_trainer(tmp_path, dataset, [CompreSSMCallback(config, SCHEDULE)]).train()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "ended after 0 batches, 4 are needed"),
        ([{"input_ids": torch.ones(2, 8, dtype=torch.long)}] * 3, "ended after 3 batches"),
        ([{"pixel_values": torch.ones(2, 8)}] * 8, "it needs input_ids"),
        ([{"input_ids": torch.ones(2, 1, dtype=torch.long)}] * 8, "no token to predict"),
        (
            [{"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.full((2, 8), -100)}] * 8,
            "no token to predict",
        ),
    ],
)
def test_calibration_data_that_is_missing_or_unusable_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        analyze(build_model(), batches, TARGET)


def test_too_little_training_data_to_calibrate_on_is_refused_before_training(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset.select(range(20)), [CompreSSMCallback(TARGET, SCHEDULE)])
    with pytest.raises(ValueError, match="ended after 2 batches, 4 are needed"):
        trainer.train()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(batches, value):
    model = build_model()
    model.backbone.layers[1].mixer.A_log.data[3, 2] = value
    with pytest.raises(ValueError, match="layer 1 A_log holds NaN or Inf"):
        analyze(model, batches, TARGET)


def test_statistics_and_losses_that_are_not_finite_are_refused(batches):
    model = build_model()
    model.backbone.layers[0].mixer.in_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 0: the state scores are not finite"):
        analyze(model, batches, TARGET)
    model = build_model()
    model.backbone.norm_f.weight.data.fill_(float("inf"))
    before = weights_of(model)
    with pytest.raises(ValueError, match="the loss on the calibration batches is NaN or Inf"):
        analyze(model, batches, TARGET)
    assert_identical(weights_of(model), before)


def test_a_report_is_applied_once_and_to_its_own_sizes(batches):
    model = build_model()
    report, second = analyze(model, batches, TARGET), analyze(model, batches, CompreSSMConfig(target_state_size=8))
    compress(model, report)
    with pytest.raises(ValueError, match="has been applied already"):
        compress(model, report)
    with pytest.raises(ValueError, match="made for state sizes"):
        compress(model, second)
    assert model.config.state_size == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_masters_are_refused_in_training(tmp_path, dataset, batches, dtype):
    model = build_model().to(dtype)
    with pytest.raises(ValueError, match=f"is trained in {dtype}.*Keep the weights in float32"):
        compress(model, analyze(model, batches, TARGET), torch.optim.AdamW(model.parameters()))
    trainer = build_trainer(tmp_path, dataset, [CompreSSMCallback(TARGET, SCHEDULE)], model=model)
    with pytest.raises(ValueError, match="Keep the weights in float32"):
        trainer.train()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("falcon_mamba", "normalises B and C over the state"),
        ("mamba2", "shared within heads and groups"),
        ("jamba", "hybrids"),
        ("zamba2", "hybrids"),
        ("bamba", "hybrids"),
    ],
)
def test_other_state_space_models_are_refused_by_name(batches, model_type, reason):
    class Holder(torch.nn.Linear):  # the weights do not matter: the type is refused before they are read
        config = AutoConfig.for_model(model_type)

    with pytest.raises(ValueError, match=f"model type '{model_type}': .*{reason}.* Supported: mamba"):
        analyze(Holder(2, 2), batches, TARGET)


def test_models_without_state_layers_are_refused(tmp_path, dataset, batches):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model type 'gpt2': .* Supported: mamba"):
        analyze(gpt2, batches, TARGET)
    with pytest.raises(ValueError, match="model type 'gpt2'"):
        build_trainer(tmp_path, dataset, [CompreSSMCallback(TARGET, SCHEDULE)], model=gpt2)
    with pytest.raises(ValueError, match="there is no state to resize"):
        analyze(build_model(num_hidden_layers=0), batches, TARGET)


def test_a_model_whose_weights_and_size_disagree_is_refused(batches):
    model = build_model()
    model.backbone.layers[0].mixer.ssm_state_size = 8
    with pytest.raises(ValueError, match=r"layer 0: x_proj\.weight has 34 entries .* state_size = 8 asks for 18"):
        analyze(model, batches, TARGET)


def test_an_adapter_on_the_projection_is_refused(batches):
    class LoraLinear(torch.nn.Linear):
        pass

    model = build_model()
    model.backbone.layers[0].mixer.x_proj = LoraLinear(64, 34, bias=False)
    with pytest.raises(ValueError, match="belongs to a LoraLinear.*Merge adapters"):
        analyze(model, batches, TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_options_that_a_resize_would_break_are_refused_before_training(tmp_path, dataset, options, message):
    trainer = build_trainer(tmp_path, dataset, [CompreSSMCallback(TARGET, SCHEDULE)], **options)
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
    trainer, callback = build_trainer(tmp_path, dataset), CompreSSMCallback(TARGET, SCHEDULE)
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
        CompreSSMCallback(TARGET, SCHEDULE).attach(trainer)


def test_a_layer_wise_optimizer_is_refused_before_training(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset, [CompreSSMCallback(TARGET, SCHEDULE)])
    trainer.optimizer = LayerWiseDummyOptimizer()
    with pytest.raises(ValueError, match="LayerWiseDummyOptimizer"):
        trainer.train()


def test_a_second_callback_is_refused_before_training(tmp_path, dataset):
    callbacks = [CompreSSMCallback(TARGET, SCHEDULE), CompreSSMCallback(TARGET, SCHEDULE)]
    with pytest.raises(ValueError, match="2 CompreSSMCallbacks would each cut the same model"):
        build_trainer(tmp_path, dataset, callbacks).train()


def test_calibration_data_that_can_be_read_only_once_is_refused(tmp_path, batches):
    with pytest.raises(ValueError, match="calibration_loader can be read only once"):
        CompreSSMCallback(TARGET, SCHEDULE, calibration_loader=iter(batches))

    class OneShot(torch.utils.data.IterableDataset):
        def __iter__(self):
            return self

        def __next__(self):
            return {"input_ids": torch.ones(8, dtype=torch.long)}

    trainer = build_trainer(tmp_path, OneShot(), [CompreSSMCallback(TARGET, SCHEDULE)])
    with pytest.raises(ValueError, match="the training data can be read only once"):
        trainer.train()


def test_a_restored_callback_that_lost_its_loader_is_refused(tmp_path, dataset, batches):
    options = {"save_strategy": "steps", "save_steps": 10, "restore_callback_states_from_checkpoint": True}
    callback = CompreSSMCallback(TARGET, SCHEDULE, calibration_loader=batches)
    build_trainer(tmp_path, dataset, [callback], **options).train()
    trainer = build_trainer(tmp_path, dataset, [callback], **options)
    with pytest.raises(ValueError, match="rebuilds the callback without its calibration_loader"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_model_with_adapters_is_refused(batches):
    model = build_model()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        analyze(model, batches, TARGET)


def test_wrapped_models_are_refused(batches):
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        analyze(torch.nn.DataParallel(build_model()), batches, TARGET)


def test_an_optimizer_made_before_a_resume_changed_the_sizes_is_refused(tmp_path, dataset):
    callback = CompreSSMCallback(TARGET, SCHEDULE)
    build_trainer(tmp_path, dataset, [callback], save_strategy="steps", save_steps=10).train()
    trainer = build_trainer(tmp_path, dataset, [CompreSSMCallback(TARGET, SCHEDULE)])
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="does not hold layer 0 x_proj.weight"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


@pytest.fixture
def checkpoint(tmp_path, dataset):
    """A checkpoint after both cuts."""
    callback = CompreSSMCallback(TARGET, SCHEDULE)
    build_trainer(tmp_path, dataset, [callback], save_strategy="steps", save_steps=12).train()
    return tmp_path / "checkpoint-12"


def edit_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_checkpoint_passes(checkpoint):
    assert check_checkpoint(checkpoint) == {0: 4, 1: 4}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="gpt2")), ValueError, "type 'gpt2'"),
        (
            lambda f: edit_json(f / "config.json", lambda c: c.update(state_size=16)),
            ValueError,
            "says state_size = 16",
        ),
        (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json is truncated or damaged"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            ValueError,
            "model.safetensors is truncated or damaged",
        ),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, damage, error, message):
    damage(checkpoint)
    with pytest.raises(error, match=message):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "compressm.json").write_text("{"), "is truncated or damaged"),
        (lambda f: edit_json(f / "compressm.json", lambda c: c.update(format_version=99)), "history format 99"),
        (
            lambda f: edit_json(f / "compressm.json", lambda c: c["events"].pop()),
            "of which compressm.json knows nothing",
        ),
        (lambda f: edit_json(f / "compressm.json", lambda c: c["events"][0].pop("kept_states")), "malformed history"),
        (lambda f: (f / "hsv.safetensors").write_bytes(b"no"), "is damaged"),
    ],
)
def test_a_damaged_history_is_refused(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        load_history(checkpoint)


def test_a_history_that_contradicts_the_weights_is_refused(checkpoint, dataset):
    def change(content):
        event = content["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["exported_history"]["events"][-1]
        event |= {"state_sizes_after": [5] * LAYERS, "kept_states": [list(range(5))] * LAYERS}

    edit_json(checkpoint / "trainer_state.json", change)
    trainer = build_trainer(checkpoint.parent, dataset, [CompreSSMCallback(TARGET, SCHEDULE)])
    with pytest.raises(ValueError, match=r"history ends with state sizes {0: 5, 1: 5}, its weights have {0: 4, 1: 4}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_stock_loading_of_mismatched_sizes_is_an_error_and_not_random_weights(checkpoint):
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(checkpoint, config=MambaConfig.from_pretrained(checkpoint, state_size=16))
