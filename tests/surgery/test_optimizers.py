"""A resized tensor goes on learning, with the moments it had."""

import pytest
import torch
from conftest import build_model, train_steps
from transformers import Adafactor
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_compressm import CompreSSMConfig, analyze, compress, parameter_groups
from hf_compressm.architectures import state_layers

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=False),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=True),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "adamw amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "transformers adafactor": lambda groups: Adafactor(groups, lr=1e-3, relative_step=False, scale_parameter=False),
    "torch adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-3),
}


def resized_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {
        f"{index} {path}": mixer.get_parameter(path)
        for index, mixer in state_layers(model).items()
        for path in ("x_proj.weight", "A_log")
    }


@pytest.fixture(params=OPTIMIZERS)
def run(request, batches):
    """(model, optimizer, report): trained for some steps, analysed, not yet cut."""
    model = build_model()
    optimizer = OPTIMIZERS[request.param](parameter_groups(model, 0.01))
    train_steps(model, optimizer, batches)
    return model, optimizer, analyze(model, batches, CompreSSMConfig(target_state_size=6))


def test_the_next_step_moves_every_resized_tensor(run, batches):
    model, optimizer, report = run
    compress(model, report, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in resized_parameters(model).items()}
    train_steps(model, optimizer, batches[:1])
    for name, parameter in resized_parameters(model).items():
        moved = (parameter != before[name]).float().mean()
        assert moved > 0.1, f"{name}: only {moved:.0%} of its entries moved"


def test_the_optimizer_holds_the_models_parameters_at_their_positions(run):
    model, optimizer, report = run
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    compress(model, report, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups] == order
    assert {id(parameter) for parameter in optimizer.state} <= names.keys()


def test_moments_follow_their_states(run):
    model, optimizer, report = run
    mixer = model.backbone.layers[1].mixer
    before = {
        key: value.clone() for key, value in optimizer.state[mixer.A_log].items() if isinstance(value, torch.Tensor)
    }
    compress(model, report, optimizer)
    after = optimizer.state[mixer.A_log]
    keep = report.kept_states[1]
    assert before
    for key, value in before.items():
        along_states = value.ndim > 0 and value.shape[-1] == 16
        assert torch.equal(after[key], value[..., keep] if along_states else value), key


def test_training_with_the_cut_optimizer_goes_on_without_a_jump(run, batches):
    model, optimizer, report = run
    compress(model, report, optimizer)
    losses = train_steps(model, optimizer, batches)
    assert max(losses) < report.loss_before + 0.3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


class PreconditionedSGD(torch.optim.SGD):
    """An optimizer with a state that no rule can know: a preconditioner of its own shape."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                shape = (parameter.shape[0], 3)
                self.state[parameter].setdefault("preconditioner", torch.ones(shape))
        return super().step(closure)


def test_unknown_state_is_dropped_with_a_warning_and_training_goes_on(batches):
    model = build_model()
    optimizer = PreconditionedSGD(parameter_groups(model, 0.0), lr=1e-2)
    train_steps(model, optimizer, batches[:2])
    report = analyze(model, batches, CompreSSMConfig(target_state_size=6))
    with pytest.warns(
        UserWarning, match="'preconditioner' that PreconditionedSGD keeps for layer 0 x_proj.weight cannot"
    ):
        compress(model, report, optimizer)
    assert model.backbone.layers[0].mixer.A_log not in optimizer.state
    train_steps(model, optimizer, batches[:2])


def test_a_layer_wise_optimizer_is_refused(batches):
    model = build_model()
    report = analyze(model, batches, CompreSSMConfig(target_state_size=6))
    with pytest.raises(ValueError, match="LayerWiseDummyOptimizer"):
        compress(model, report, LayerWiseDummyOptimizer())
    assert model.config.state_size == 16


def test_an_optimizer_with_hooks_on_its_parameters_is_refused(batches):
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.backbone.layers[0].mixer.A_log.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="layer 0 A_log carries gradient hooks"):
        compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6)), optimizer)


def test_an_optimizer_of_another_model_is_refused(batches):
    model = build_model()
    optimizer = torch.optim.AdamW(build_model().parameters())
    with pytest.raises(ValueError, match=r"does not hold layer 0 x_proj\.weight"):
        compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6)), optimizer)


def test_frozen_tensors_need_no_optimizer(batches):
    model = build_model()
    for parameter in resized_parameters(model).values():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6)), optimizer)
    assert not any(parameter.requires_grad for parameter in resized_parameters(model).values())


def test_parameter_groups_leave_state_space_parameters_biases_and_norms_undecayed():
    model = build_model()
    decayed, undecayed = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".", 3)[-1] for p in decayed["params"]} == {
        "weight",  # of the embeddings, which are also the head
        "mixer.conv1d.weight",
        "mixer.in_proj.weight",
        "mixer.x_proj.weight",
        "mixer.dt_proj.weight",
        "mixer.out_proj.weight",
    }
    assert decayed["weight_decay"] == 0.1 and undecayed["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))
