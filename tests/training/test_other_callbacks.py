"""Callbacks beside ours that keep copies of the weights follow the cuts as companions, or are refused at the start."""

import copy

import pytest
from conftest import build_model, build_trainer
from torch.optim.swa_utils import AveragedModel
from trainer_callbacks import cutting_callback
from transformers import TrainerCallback

from hf_compressm.architectures import state_sizes


class Holder(TrainerCallback):
    """A callback that holds something, and looks at it after every step."""

    def __init__(self, held):
        self.held = held

    def on_step_end(self, args, state, control, **kwargs):
        assert self.held is not None


def trainer_with(tmp_path, dataset, hold, companions=()):
    """Return a trainer with a callback that holds what `hold` makes of the model."""
    model = build_model()
    held = hold(model)
    trainer = build_trainer(tmp_path, dataset, [Holder(held)], model=model)
    cutting_callback(companions=[held] if companions else ()).attach(trainer)
    return trainer


@pytest.mark.parametrize(
    "hold",
    [
        copy.deepcopy,  # as the reference of TR-DPO
        AveragedModel,
        lambda model: [parameter.detach().clone() for parameter in model.parameters()],  # as shadow parameters
        lambda model: list(model.parameters()),
        lambda model: {name: parameter.detach() for name, parameter in model.named_parameters()},
    ],
    ids=["copy", "average", "list of copies", "list of parameters", "dict"],
)
def test_a_callback_that_holds_weights_is_refused_before_training(tmp_path, dataset, hold):
    trainer = trainer_with(tmp_path, dataset, hold)
    with pytest.raises(ValueError, match=r"Holder\.held holds a copy .* one of its companions"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("hold", [copy.deepcopy, AveragedModel])
def test_a_companion_that_a_callback_holds_follows_the_cuts(tmp_path, dataset, hold):
    trainer = trainer_with(tmp_path, dataset, hold, companions=True)
    trainer.train()
    (held,) = (callback.held for callback in trainer.callback_handler.callbacks if isinstance(callback, Holder))
    assert state_sizes(getattr(held, "module", held)) == state_sizes(trainer.model) == {0: 4, 1: 4}


@pytest.mark.parametrize("hold", [lambda model: model, lambda model: model.backbone.layers[0], lambda model: [1, "a"]])
def test_a_callback_that_holds_the_model_itself_is_no_trouble(tmp_path, dataset, hold):
    trainer = trainer_with(tmp_path, dataset, hold)
    trainer.train()
    assert state_sizes(trainer.model) == {0: 4, 1: 4}


class LateHolder(TrainerCallback):
    """It makes its copy when training begins, as TRL's BEMACallback does, and so after ours was asked."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.held = copy.deepcopy(model)


def test_a_copy_that_is_made_when_training_begins_is_refused_before_the_first_cut(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset)
    callback = cutting_callback()
    callback.attach(trainer)
    trainer.add_callback(LateHolder())
    with pytest.raises(ValueError, match=r"LateHolder\.held holds a copy"):
        trainer.train()
    assert callback.history.events == [] and state_sizes(trainer.model) == {0: 16, 1: 16}
