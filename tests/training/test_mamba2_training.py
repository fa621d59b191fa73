"""Mamba-2 and a hybrid in Trainer's hands: cut in either basis, resumed exactly, taken back bit for bit."""

import itertools
from functools import partial

import pytest
import torch
from conftest import LAYERS, STATE_SIZE, assert_identical, build_trainer, losses_of, random_state, weights_of
from scalar_decay_models import build_bamba, build_mamba2
from torch.optim.swa_utils import AveragedModel
from trainer_callbacks import SnapshotAndRestore, WorseAt
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, default_data_collator

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan, prepare
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import load_history

BASES = pytest.mark.parametrize("basis", ["axis", "balanced"])
slow = partial(pytest.param, marks=pytest.mark.slow)
BALANCED_FIRST = pytest.mark.parametrize("basis", [slow("axis"), "balanced"])
SAVING = {"save_strategy": "steps", "save_steps": 1}
NEVER = {"tolerance": 1e-12, "min_reduction": 0.5}
CASES = {
    "mamba2, axis": (build_mamba2, {"basis": "axis"}, [4, 4]),
    "mamba2, balanced": (build_mamba2, {"basis": "balanced"}, [4, 4]),
    "mamba2, one layer balanced": (build_mamba2, {"basis": "balanced", "skip_layers": [1]}, [4, STATE_SIZE]),
    "bamba, axis": (build_bamba, {"basis": "axis", "criterion": "greedy"}, [4, 4]),
    "bamba, balanced": (build_bamba, {"basis": "balanced"}, [4, 4]),
}


def callback_for(config: dict, companions=(), **schedule) -> CompreSSMCallback:
    """It cuts to four states, of 12 steps after 3 and 6."""
    config = {"calibration_batches": 4} | ({} if "tolerance" in config else {"target_state_size": 4}) | config
    schedule = CompreSSMSchedule(**({"end": 0.5, "events": 2} | schedule))
    return CompreSSMCallback(CompreSSMConfig(**config), schedule, companions=companions)


def trainer_for(folder, dataset, callback=None, build=build_mamba2, seed=0, attached=True, others=(), **options):
    """A trainer of a plain model of 12 steps; the callback comes after `others`."""
    callbacks = [*others] if attached or callback is None else [*others, callback]
    options = {"max_steps": 12} | options
    model = options.pop("model", None) or build(seed)
    trainer = build_trainer(folder, dataset, callbacks, model=model, **options)
    if attached and callback is not None:
        callback.attach(trainer)
    return trainer


def plain_weights_of(model) -> dict[str, torch.Tensor]:
    """All weights but the projections, which a plain model has not."""
    return {name: weight for name, weight in weights_of(model).items() if not name.endswith(("B_proj", "C_proj"))}


def assert_projects_nothing(trainer) -> None:
    """The projections are as they were made, and the optimizer has nothing for them."""
    for mixer in state_layers(trainer.model).values():
        whole = torch.eye(STATE_SIZE).expand(2, STATE_SIZE, STATE_SIZE)
        for projection in (mixer.B_proj, mixer.C_proj):
            assert torch.equal(projection, whole) and projection.grad is None
            assert projection not in trainer.optimizer.state
        assert mixer.reduced_state_size is None


@BASES
def test_a_callback_that_never_cuts_leaves_the_run_bit_identical(tmp_path, dataset, basis):
    small = dataset.select(range(88))  # two epochs
    plain = trainer_for(tmp_path, small)
    plain.train()
    plain_random_state = random_state()
    callback = callback_for({"basis": basis, **NEVER})
    watched = trainer_for(tmp_path, small, callback)
    watched.train()

    assert random_state() == plain_random_state
    assert [event.is_cut for event in callback.history.events] == [False, False]
    assert losses_of(watched) == losses_of(plain)
    assert_identical(plain_weights_of(watched.model), weights_of(plain.model))
    if basis == "balanced":
        assert_projects_nothing(watched)


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(request, tmp_path_factory, dataset):
    """(name of the case, trainer after its run, history); every step has left a checkpoint."""
    install_scan()
    build, config, _ = CASES[request.param]
    callback = callback_for(config, monitor_steps=1)
    trainer = trainer_for(tmp_path_factory.mktemp("run"), dataset, callback, build, attached=False, **SAVING)
    trainer.train()
    return request.param, trainer, callback.history


def test_a_run_cuts_at_its_steps_and_every_checkpoint_is_whole(uninterrupted):
    case, trainer, history = uninterrupted
    sizes = CASES[case][2]
    assert history.steps == [3, 6] and history.events[-1].state_sizes_after == sizes
    assert list(state_sizes(trainer.model).values()) == sizes
    losses = losses_of(trainer)
    assert losses[12] < losses[6] < losses[1]
    for step, expected in ((2, [STATE_SIZE] * 2), (3, history.events[0].state_sizes_after), (12, sizes)):
        folder = f"{trainer.args.output_dir}/checkpoint-{step}"
        assert list(check_checkpoint(folder).values()) == expected
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(trainer.model) and list(state_sizes(loaded).values()) == expected
    assert_identical(weights_of(loaded), weights_of(trainer.model))
    assert load_history(folder).to_dict() == history.to_dict()


@pytest.mark.parametrize("checkpoint", [2, slow(3), 4, slow(8)])  # before, at, between and after the cuts
def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(uninterrupted, tmp_path, dataset, checkpoint):
    case, whole, history = uninterrupted
    build, config, _ = CASES[case]
    callback = callback_for(config, monitor_steps=1)
    resumed = trainer_for(tmp_path, dataset, callback, build, seed=1, attached="bamba" in case, **SAVING)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{checkpoint}")
    assert losses_of(resumed) == losses_of(whole)
    assert_identical(weights_of(resumed.model), weights_of(whole.model))
    left, right = (trainer.model.config.to_dict() | {"_name_or_path": None} for trainer in (resumed, whole))
    assert left == right
    for left, right in zip(history.events, callback.history.events, strict=True):
        assert (left.step, left.kept_states, left.loss_after) == (right.step, right.kept_states, right.loss_after)


def test_observations_say_how_far_the_singular_values_moved_and_could(uninterrupted):
    _, _, history = uninterrupted
    observations = history.observations
    assert [observation.step for observation in observations] == list(range(1, 13))
    for last, now in itertools.pairwise(observations):
        assert (now.weyl_bound is None) == (now.movement is None) == (now.state_sizes != last.state_sizes)
        for position, movement in enumerate(now.movement or []):
            moved = now.hankel_singular_values[position] - last.hankel_singular_values[position]
            assert 0 < movement == moved.abs().max() <= now.weyl_bound[position] * (1 + 1e-9)


def test_a_callback_that_is_only_added_is_refused_before_training(tmp_path, dataset):
    trainer = trainer_for(tmp_path, dataset)
    trainer.add_callback(callback_for({"basis": "balanced"}))
    with pytest.raises(ValueError, match=r"not prepared for basis = 'balanced'.* callback\.attach\(trainer\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_that_was_prepared_before_serves_a_callback_that_is_only_added(tmp_path, dataset):
    model = build_mamba2()
    prepare(model)
    trainer = trainer_for(tmp_path, dataset, model=model)
    trainer.add_callback(callback_for({"basis": "balanced"}))
    trainer.train()
    assert state_sizes(trainer.model) == {0: 4, 1: 4}


def test_an_optimizer_that_was_made_before_gets_the_new_parameters(tmp_path, dataset):
    model, callback = build_mamba2(), callback_for({"basis": "balanced"})
    trainer = trainer_for(tmp_path, dataset, model=model)
    trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    callback.attach(trainer)
    trainer.train()
    assert trainer.model.config.balanced_state_size == 4
    assert all(mixer.B_proj in trainer.optimizer.state for mixer in state_layers(trainer.model).values())


@BASES
def test_a_model_made_by_model_init_is_cut_and_resumed(tmp_path, dataset, basis):
    def train(folder, checkpoint=None):
        args = build_trainer(folder, dataset, max_steps=12, **SAVING | {"save_steps": 4}).args
        made = {"model_init": lambda: build_mamba2(), "data_collator": default_data_collator}
        trainer = Trainer(args=args, train_dataset=dataset, **made)
        callback_for({"basis": basis}).attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = train(tmp_path / "a")
    assert state_sizes(whole.model) == {0: 4, 1: 4}
    resumed = train(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"))
    assert_identical(weights_of(resumed.model), weights_of(whole.model))


class FollowedAfterEachStep(TrainerCallback):
    """It updates an average, before ours cuts both."""

    def __init__(self, average: AveragedModel):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


@BASES
def test_an_average_that_was_made_before_follows_the_cuts(tmp_path, dataset, basis):
    model = build_mamba2()
    latest = AveragedModel(model, avg_fn=lambda average, now, count: now)  # so what it should be is known
    callback = callback_for({"basis": basis}, companions=[latest])
    trainer = trainer_for(tmp_path, dataset, callback, model=model, others=[FollowedAfterEachStep(latest)])
    trainer.train()
    assert state_sizes(latest.module) == {0: 4, 1: 4} and type(latest.module) is type(model)
    assert_identical(weights_of(latest.module), weights_of(model))


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize(
    ("basis", "storage"), [("axis", "disk"), ("balanced", "memory"), slow("axis", "memory"), slow("balanced", "disk")]
)
def test_after_a_rollback_the_run_is_that_of_a_model_never_cut(tmp_path, dataset, basis, storage):
    evaluating = EVALUATING | {"eval_dataset": dataset.select(range(16))}
    callback = callback_for({"basis": basis}, rollback_tolerance=0.05, rollback_storage=storage)
    rolled_back = trainer_for(tmp_path, dataset, callback, others=[WorseAt(4)], **evaluating)
    rolled_back.train()
    never_cut = trainer_for(tmp_path, dataset, others=[SnapshotAndRestore(3, 4)], **evaluating)
    never_cut.train()
    (event,) = callback.history.events
    assert event.is_cut and event.rolled_back_at == 4
    assert_identical(plain_weights_of(rolled_back.model), weights_of(never_cut.model))
    expected, losses = losses_of(never_cut), losses_of(rolled_back)
    assert [losses[step] for step in range(5, 13)] == [expected[step] for step in range(5, 13)]
    if basis == "balanced":
        assert_projects_nothing(rolled_back)


@BASES
@pytest.mark.parametrize("best", [2, slow(4)])  # before the first cut, and between the cuts
def test_the_best_model_is_loaded_at_its_own_size_and_trained_on(tmp_path, dataset, basis, best):
    others = [WorseAt(*{2, 4, 6, 8, 10, 12} - {best})]
    options = EVALUATING | SAVING | {"save_steps": 2, "load_best_model_at_end": True}
    evaluated = {"eval_dataset": dataset.select(range(16))}
    trainer = trainer_for(tmp_path, dataset, callback_for({"basis": basis}), others=others, **options, **evaluated)
    trainer.train()
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    weights = weights_of(trainer.model)
    assert_identical(weights, weights_of(kept))
    size = {2: STATE_SIZE, 4: 8}[best]
    assert state_sizes(trainer.model) == dict.fromkeys(range(LAYERS), size)
    trainer.args.load_best_model_at_end = False
    trainer.pop_callback(CompreSSMCallback)
    trainer.args.max_steps = 1
    Trainer.train(trainer)
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, weights[name])}
    without_use = {name for name in weights if best == 2 and name.endswith(("B_proj", "C_proj"))}
    assert moved == weights.keys() - without_use


OPTIONS = [{"bf16": True}, {"gradient_accumulation_steps": 2}]


@BALANCED_FIRST
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_cuts_work_with(tmp_path, dataset, basis, options):
    trainer = trainer_for(tmp_path, dataset, callback_for({"basis": basis}), **options)
    trainer.train()
    assert state_sizes(trainer.model) == {0: 4, 1: 4}
    assert losses_of(trainer)[12] < losses_of(trainer)[1]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@BALANCED_FIRST
def test_recomputed_activations_give_the_same_run(tmp_path, dataset, basis):
    runs = [
        trainer_for(tmp_path, dataset, callback_for({"basis": basis}), activation_checkpointing=recomputed)
        for recomputed in (False, True)
    ]
    for run in runs:
        run.train()
    assert_identical(*(weights_of(run.model) for run in runs))


@pytest.mark.slow
@BASES
def test_a_compiled_run_is_the_eager_one(tmp_path, dataset, basis):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = [
        trainer_for(tmp_path, dataset, callback_for({"basis": basis}), adam_epsilon=1e-6, **options)
        for options in ({}, compiled)
    ]
    for run in runs:
        run.train()
    assert hasattr(runs[1].model_wrapped, "_orig_mod") and state_sizes(runs[1].model) == {0: 4, 1: 4}
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), abs=1e-5)


@pytest.mark.slow
@BASES
def test_layers_are_cut_when_they_have_settled(tmp_path, dataset, basis):
    """Learning slows down: some layer settles before the window ends, when all that move are cut."""
    schedule = {"trigger": "settled", "start": 0.1, "end": 0.9, "monitor_steps": 4, "settled_over": 0.2, "events": 1}
    callback = callback_for({"basis": basis, "calibration_batches": 8}, **schedule)
    trainer = trainer_for(tmp_path, dataset, callback, max_steps=60)
    trainer.train()
    history = callback.history
    assert state_sizes(trainer.model) == {0: 4, 1: 4}
    assert "settled" in {reason for event in history.events for reason in event.reasons}
    compared = [seen for seen in history.observations if seen.compared_with is not None]
    assert compared[0].share_distance != compared[-1].share_distance and 0 in compared[0].settled_points
    if basis == "balanced":  # each layer at its own time
        assert len(history.events) == 2
        assert {c for seen in compared for c in seen.rank_correlation} <= {1.0, None}  # σ are in order; shares decide
    else:  # all at one size
        assert len(history.events) == 1


@BASES
def test_a_checkpoint_of_the_other_class_is_refused(tmp_path, dataset, basis):
    other = {"axis": "balanced", "balanced": "axis"}[basis]
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer_for(tmp_path, dataset, callback_for({"basis": other}), **saving).train()
    trainer = trainer_for(tmp_path, dataset, callback_for({"basis": basis}), **saving)
    weights = weights_of(trainer.model)
    for checkpoint in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(ValueError, match="checkpoint-4 holds a model of type .*give the basis that its run had"):
            trainer.train(resume_from_checkpoint=checkpoint)
    assert_identical(weights_of(trainer.model), weights)
