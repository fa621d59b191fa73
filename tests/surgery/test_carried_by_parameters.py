"""What hangs on a parameter besides its values goes over to the resized one, or is refused before a cut."""

import pytest
import torch
from conftest import build_model, build_trainer
from torch import nn

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress
from hf_compressm.architectures import state_layers
from hf_compressm.engines import new_parameter_like
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes
from hf_compressm.surgery.shrink_and_grow import pad_state

CONFIG = CompreSSMConfig(target_state_size=6, calibration_batches=2)


def test_what_a_parameter_carries_goes_over_to_the_resized_one(batches):
    model = build_model()
    before = model.backbone.layers[0].mixer.A_log
    before.requires_grad_(False)
    before.sharding_hint, before.grad_dtype = "rows", torch.float64
    compress(model, analyze(model, batches, CONFIG))
    after = model.backbone.layers[0].mixer.A_log
    assert after is not before and after.shape == (64, 6)
    assert after.sharding_hint == "rows" and vars(after) == vars(before)
    assert not after.requires_grad and after.grad_dtype == torch.float64


def test_nothing_else_hangs_on_a_parameter():
    """A new attribute of tensors that can be written makes this test fail: decide then what becomes of it."""
    old = nn.Parameter(torch.ones(2, 3))
    new = new_parameter_like(old, torch.ones(2, 2))
    writable = set()
    for name in dir(old):
        if not name.startswith("__"):
            try:
                setattr(new, name, getattr(old, name))
            except (AttributeError, TypeError, RuntimeError, ValueError):
                continue
            if name not in vars(new):  # so it lies outside of __dict__
                writable.add(name)
            vars(new).clear()
            new = new_parameter_like(old, torch.ones(2, 2))
    assert writable == {"data", "grad", "grad_dtype", "requires_grad"} | {
        "_backward_hooks",
        "_grad",
        "_grad_fn",
        "_post_accumulate_grad_hooks",
    }


HOOKS = {
    "logging, as wandb.watch": lambda parameter: parameter.register_hook(lambda grad: None),
    "freezing by a mask": lambda parameter: parameter.register_hook(lambda grad, mask=(parameter > 0): grad * mask),
    "layer-wise": lambda parameter: parameter.register_post_accumulate_grad_hook(lambda parameter: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_gradient_hooks_are_refused_before_anything_and_fit_again_after_the_cut(kind, batches):
    model = build_model()
    handle = HOOKS[kind](model.backbone.layers[1].mixer.A_log)
    report = analyze(model, batches, CONFIG)  # it changes nothing, so it is not concerned
    for optimizer in (None, torch.optim.AdamW(model.parameters())):
        with pytest.raises(ValueError, match=r"layer 1 A_log carries gradient hooks .* set them again after it"):
            compress(model, report, optimizer)
    with pytest.raises(ValueError, match="layer 1 A_log carries gradient hooks"):
        pad_state(model, 20)
    assert state_layers(model).sizes == {0: 16, 1: 16} and not report.applied
    handle.remove()
    compress(model, report)
    HOOKS[kind](model.backbone.layers[1].mixer.A_log)
    model(**batches[0]).loss.backward()


def test_hooks_are_refused_when_training_starts(tmp_path, dataset):
    trainer = build_trainer(tmp_path, dataset)
    trainer.model.backbone.layers[0].mixer.x_proj.weight.register_hook(lambda grad: None)
    CompreSSMCallback(CONFIG, CompreSSMSchedule(end=0.5)).attach(trainer)
    with pytest.raises(ValueError, match=r"layer 0 x_proj\.weight carries gradient hooks"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_hooks_are_refused_when_the_size_of_a_checkpoint_is_taken():
    model, smaller = build_model(), build_model(state_size=6)
    adopt_checkpoint_sizes(model)
    model.backbone.layers[0].mixer.A_log.register_hook(lambda grad: None)
    with pytest.raises(ValueError, match="layer 0 A_log carries gradient hooks"):
        model.load_state_dict(smaller.state_dict())
    assert state_layers(model).sizes == {0: 16, 1: 16}


def test_hooks_on_what_has_no_states_stay(batches):
    model, calls = build_model(), []
    model.backbone.layers[0].mixer.D.register_hook(lambda grad: calls.append(grad))
    compress(model, analyze(model, batches, CONFIG), torch.optim.AdamW(model.parameters()))
    model(**batches[0]).loss.backward()
    assert len(calls) == 1


class Special(nn.Parameter):
    """A Parameter of a class of its own, as quantisation has them."""


def test_a_parameter_of_another_class_is_refused(batches):
    model = build_model()
    report = analyze(model, batches, CONFIG)
    mixer = model.backbone.layers[0].mixer
    mixer.A_log = Special(mixer.A_log.detach())
    with pytest.raises(ValueError, match="layer 0 A_log is a Special, and a resized one would be a plain"):
        compress(model, report)
