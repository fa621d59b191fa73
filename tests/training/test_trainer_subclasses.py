"""An attached trainer takes every call that its own class takes, whatever that class makes of Trainer's methods."""

import inspect
from functools import partial

import pytest
from conftest import assert_identical, build_model, build_trainer, losses_of, weights_of
from huggingface_hub import ModelCard
from test_attachment import BEST
from trainer_callbacks import WorseAt
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, default_data_collator
from trl import DPOTrainer, SFTTrainer

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.sharing.model_card import CARD, SECTION
from hf_compressm.storage.history import load_history
from hf_compressm.training.attach import _StateSizeFollower
from hf_compressm.training.publishing import Publisher

SAVING = {"save_strategy": "steps", "save_steps": 2}


class Narrow(Trainer):
    """Every method takes what Trainer itself gives it, and no more."""

    def train(self):
        return super().train()

    def create_optimizer(self):
        return super().create_optimizer()

    def save_model(self, output_dir=None, _internal_call=False):
        return super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None):
        super()._save(output_dir)

    def create_model_card(self, model_name=None):
        super().create_model_card(model_name=model_name)


class Wide(Trainer):
    """Every method takes more, under names of its own, and keeps what it was given."""

    def train(self, data=None, *, resume_from_checkpoint=None, rounds=1):
        self.heard = data, resume_from_checkpoint, rounds
        return super().train(resume_from_checkpoint)

    def create_optimizer(self, model=None, decay=0.0):
        self.heard = decay
        return super().create_optimizer(model)

    def call_model_init(self, trial=None, seed=0):
        self.heard = trial, seed
        return super().call_model_init(trial)

    def save_model(self, folder=None, _internal_call=False, note=""):
        self.heard = note
        super().save_model(folder, _internal_call)

    def create_model_card(self, author="", **kwargs):
        super().create_model_card(**kwargs)
        self.heard = author
        return "written"


class Loose(Trainer):
    """It hands on whatever it gets, as TRL's A2POTrainer does."""

    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)


class WritesByItself(Trainer):
    """Nothing that saves comes down to Trainer."""

    def save_model(self, output_dir=None, _internal_call=False):
        self.model.save_pretrained(output_dir or self.args.output_dir)

    def create_optimizer(self):
        self.optimizer = self.optimizer or super().create_optimizer()
        return self.optimizer


def attached(own: type, folder, dataset, model_init=None, **changes) -> Trainer:
    """Of four steps, cut after the second."""
    is_seq2seq = issubclass(own, Seq2SeqTrainer)
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    options |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none"} | changes
    arguments = (Seq2SeqTrainingArguments if is_seq2seq else TrainingArguments)(str(folder), **options)
    model = {"model_init": model_init} if model_init else {"model": build_model()}
    trainer = own(args=arguments, train_dataset=dataset, data_collator=default_data_collator, **model)
    goal = CompreSSMConfig(target_state_size=4, calibration_batches=2)
    CompreSSMCallback(goal, CompreSSMSchedule(end=0.5, events=1)).attach(trainer)
    return trainer


OVERRIDDEN = sorted(
    name
    for part in (_StateSizeFollower, Publisher)
    for name, value in vars(part).items()
    if inspect.isfunction(value) and hasattr(Trainer, name)
)


@pytest.mark.parametrize("name", OVERRIDDEN)
@pytest.mark.parametrize("own", [Trainer, Seq2SeqTrainer, SFTTrainer, DPOTrainer, Narrow, Wide, Loose, WritesByItself])
def test_every_overridden_method_takes_what_the_trainers_own_takes(own, name):
    ours = inspect.signature(getattr(type("Attached", (_StateSizeFollower, Publisher, own), {}), name))
    theirs = list(inspect.signature(getattr(own, name)).parameters.values())[1:]
    named = [p for p in theirs if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    ours.bind(None, **{p.name: p.name for p in named})
    ours.bind(None, *(p.name for p in named if p.kind is not p.KEYWORD_ONLY))
    ours.bind(None, *(p.name for p in named if p.default is p.empty))
    if any(p.kind is p.VAR_KEYWORD for p in theirs):
        ours.bind(None, anything="else")


@pytest.mark.parametrize("own", [Narrow, Loose, Seq2SeqTrainer, WritesByItself])
def test_a_trainer_of_another_kind_saves_resumes_and_has_its_card(tmp_path, dataset, own):
    trainer = attached(own, tmp_path / "a", dataset, **SAVING)
    trainer.train()
    assert load_history(tmp_path / "a" / "checkpoint-4").steps == [2]
    trainer.save_model(str(tmp_path / "small"))
    assert load_history(tmp_path / "small").steps == [2]
    assert_identical(weights_of(type(trainer.model).from_pretrained(tmp_path / "small")), weights_of(trainer.model))
    trainer.create_model_card(model_name="Mine")  # nothing lies in the output folder but checkpoints
    assert "from **16** to **4** states" in (tmp_path / "a" / CARD).read_text()
    if own is not Narrow:
        resumed = attached(own, tmp_path / "b", dataset, **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        assert losses_of(resumed) == losses_of(trainer)


def test_arguments_of_a_trainers_own_arrive(tmp_path, dataset):
    trainer = attached(Wide, tmp_path / "a", dataset, model_init=lambda: build_model(), **SAVING)
    trainer.train("data", rounds=2)
    assert trainer.state.global_step == 4
    calls = (
        (partial(trainer.save_model, str(tmp_path / "a" / "x"), note="here"), "here"),
        (partial(trainer.save_model, folder=str(tmp_path / "a" / "y"), note="there"), "there"),
        (partial(trainer.create_optimizer, decay=0.5), 0.5),
        (partial(trainer.call_model_init, seed=3), (None, 3)),
        (partial(trainer.create_model_card, "me", language="en", tags=["mine"]), "me"),
    )
    for call, heard in calls:
        returned = call()
        assert trainer.heard == heard
    assert returned == "written"
    card = ModelCard.load(tmp_path / "a" / CARD)
    assert card.data.language == ["en"] and {"mine", "generated_from_trainer", "compressm"} <= set(card.data.tags)
    assert card.text.index("### Training hyperparameters") < card.text.index(SECTION)

    resumed = attached(Wide, tmp_path / "a", dataset, model_init=lambda: build_model(), **SAVING)
    (tmp_path / "a" / "checkpoint-4" / "trainer_state.json").unlink()
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(trainer)
    with pytest.raises(TypeError, match="resume"):
        resumed.train(resume=True)


def test_what_trainer_takes_is_taken_by_position_and_by_name(tmp_path, dataset):
    options = {"load_best_model_at_end": True, **BEST}
    trainer = build_trainer(tmp_path, dataset, [WorseAt(4)], None, dataset.select(range(8)), max_steps=4, **options)
    callback = CompreSSMCallback(
        CompreSSMConfig(target_state_size=4, calibration_batches=2), CompreSSMSchedule(end=1.0, events=1)
    )
    callback.attach(trainer)
    trainer.train(None, None, ["cache_params"])
    assert trainer.state.best_global_step == 2 and trainer.model.config.state_size == 16
    trainer.train(resume_from_checkpoint=False, trial=None, ignore_keys_for_eval=["cache_params"])
    trainer.save_model(output_dir=str(tmp_path / "x"), _internal_call=True)
    assert load_history(tmp_path / "x").to_dict() == callback.history.to_dict()
    trainer.create_model_card("de", "mit", "mine", "Title", tasks="text-generation")
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.language == ["de"] and card.data.license == "mit" and "# Title\n" in card.text
    with pytest.raises(TypeError, match="licence"):
        trainer.create_model_card(licence="mit")
