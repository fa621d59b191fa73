"""Removing states equals masking them, before and after training; padding and growth leave the function alone."""

import copy

import pytest
import torch
from conftest import assert_identical, build_model, train_steps, weights_of

from hf_compressm import CompreSSMConfig, analyze, compress, parameter_groups
from hf_compressm.architectures import state_layers
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state, shrink_state
from hf_compressm.theory.plan import Selection


def logits_of(model, batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def mask_states(model, optimizer, selections) -> None:
    """The reference: states stay where they are, but their rows, columns and moments are zero."""
    layers = state_layers(model)
    for index, mixer in layers.items():
        selection = selections[index]
        for path, value in layers.family.masked(mixer, selection).items():
            mixer.get_parameter(path).data.copy_(value)
        for path, tensor in layers.family.tensors.items():
            kept = layers.family.source_index(mixer, path, selection.kept_states)
            parameter = mixer.get_parameter(path)
            for moment in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[parameter][moment]
                zeroed = torch.zeros_like(state).index_copy_(tensor.axis, kept, state.index_select(tensor.axis, kept))
                state.copy_(zeroed)


@pytest.mark.parametrize("compensate", [True, False])
def test_removing_states_equals_masking_them_before_and_after_training(trained, batches, compensate):
    model, optimizer = trained
    masked = copy.deepcopy(model)
    masked_optimizer = torch.optim.AdamW(parameter_groups(masked, 0.1), lr=3e-3)
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    report = analyze(model, batches, CompreSSMConfig(target_state_size=5, compensate=compensate))

    compress(model, report, optimizer)
    mask_states(masked, masked_optimizer, report.plan)
    torch.testing.assert_close(logits_of(model, batches[0]), logits_of(masked, batches[0]), rtol=0, atol=1e-5)

    torch.testing.assert_close(
        train_steps(model, optimizer, batches[:5]),
        train_steps(masked, masked_optimizer, batches[:5]),
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(logits_of(model, batches[0]), logits_of(masked, batches[0]), rtol=0, atol=1e-5)


def test_the_cut_model_has_the_loss_that_the_report_measured(trained, batches):
    model, optimizer = trained
    report = analyze(model, batches, CompreSSMConfig(target_state_size=3))
    compress(model, report, optimizer)
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches[1:4:2]]
    assert report.loss_after == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert report.loss_after != pytest.approx(report.loss_before, abs=1e-5)


def test_everything_that_depends_on_the_size_follows(trained, batches):
    model, optimizer = trained
    compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6)), optimizer)
    assert model.config.state_size == 6
    for mixer in state_layers(model).values():
        assert mixer.ssm_state_size == 6
        assert mixer.A_log.shape[1] == 6
        assert mixer.x_proj.out_features == mixer.x_proj.weight.shape[0] == mixer.time_step_rank + 12


def test_a_gradient_that_is_waiting_for_its_step_follows(trained, batches):
    model, optimizer = trained
    model(**batches[0]).loss.backward()
    gradient = model.backbone.layers[0].mixer.A_log.grad.clone()
    report = analyze(model, batches, CompreSSMConfig(target_state_size=6))
    compress(model, report, optimizer)
    assert torch.equal(model.backbone.layers[0].mixer.A_log.grad, gradient[:, report.kept_states[0]])


def test_padding_is_exact_inert_and_reversible(trained, batches):
    model, _ = trained
    before, logits = weights_of(model), logits_of(model, batches[0])
    pad_state(model, 24)
    assert model.config.state_size == 24
    torch.testing.assert_close(logits_of(model, batches[0]), logits, rtol=0, atol=1e-6)

    model(**batches[0]).loss.backward()
    mixer = model.backbone.layers[0].mixer
    new_rows = [mixer.time_step_rank + 16 + i for i in range(8)] + [mixer.time_step_rank + 40 + i for i in range(8)]
    assert mixer.x_proj.weight.grad[new_rows].abs().max() == 0
    assert mixer.A_log.grad[:, 16:].abs().max() == 0

    shrink_state(model, {index: Selection(torch.arange(16)) for index in state_layers(model)})
    assert_identical(weights_of(model), before)


def test_growth_leaves_the_function_alone_and_learns(trained, batches):
    model, optimizer = trained
    logits = logits_of(model, batches[0])
    grow_state(model, 20, optimizer, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(model, batches[0]), logits, rtol=0, atol=1e-6)
    mixer = model.backbone.layers[0].mixer
    output_rows = slice(mixer.time_step_rank + 20 + 16, None)
    assert mixer.x_proj.weight[output_rows].abs().max() == 0
    train_steps(model, optimizer, batches[:2])
    assert (mixer.x_proj.weight[output_rows].abs().sum(1) > 0).all()
    assert optimizer.state[mixer.A_log]["exp_avg"].shape == mixer.A_log.shape


def test_a_failure_in_the_last_layer_leaves_everything_as_it_was(trained, batches):
    model, optimizer = trained
    report = analyze(model, batches, CompreSSMConfig(target_state_size=5))
    report.plan[1].compensation.fill_(float("inf"))
    before, parameters = weights_of(model), list(model.parameters())
    moments = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"layer 1: the resized x_proj\.weight would hold NaN or Inf"):
        compress(model, report, optimizer)
    assert_identical(weights_of(model), before)
    assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
    assert model.config.state_size == 16
    torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("selections", "message"),
    [
        ({0: Selection(torch.arange(4))}, "given to a model with layers"),
        ({0: Selection(torch.tensor([1, 0])), 1: Selection(torch.arange(2))}, "layer 0: kept states must be sorted"),
        (
            {0: Selection(torch.arange(2)), 1: Selection(torch.tensor([1, 16]))},
            "layer 1: kept states .* within 0 … 15",
        ),
        ({0: Selection(torch.arange(0)), 1: Selection(torch.arange(0))}, "kept states must be"),
    ],
)
def test_selections_that_do_not_fit_are_refused(selections, message):
    with pytest.raises(ValueError, match=message):
        shrink_state(build_model(), selections)


def test_enlarging_to_fewer_states_is_refused():
    with pytest.raises(ValueError, match="cannot enlarge to 8 states"):
        pad_state(build_model(), 8)
