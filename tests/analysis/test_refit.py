"""Refit: kept states fitted to the uncut layers, judged on other data, and what becomes of them."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import assert_identical, build_model, train_steps, weights_of
from torch import nn

from hf_compressm import CompreSSMConfig, LRUConfig, LRUForSequenceClassification, analyze, compress, parameter_groups
from hf_compressm.analysis.activations import collect_statistics, layer_inputs
from hf_compressm.analysis.calibration import undisturbed
from hf_compressm.analysis.losses import mean_loss
from hf_compressm.analysis.masking import masked_parameters
from hf_compressm.analysis.objective import Objective
from hf_compressm.analysis.output_fit import OutputError, fit_states
from hf_compressm.analysis.refit import refitted
from hf_compressm.architectures import state_layers
from hf_compressm.architectures.selective.mamba import MAMBA
from hf_compressm.engines import sum_over_processes
from hf_compressm.theory.selective import LayerInputs, StateMaps

CONFIG = CompreSSMConfig(target_state_size=3, refit=True, calibration_batches=6)


@pytest.fixture
def model(learned):
    model = build_model()
    model.load_state_dict(learned)
    return model


def with_labels(batches):
    return [batch | {"labels": batch["input_ids"]} for batch in batches]


# The fit of one layer


def random_layer(states=4, channels=6, hidden=5, length=30, batch=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    maps = StateMaps(normal(states, channels) / 2, normal(states, channels) / 2, normal(channels, states) / 2)
    gate, u = normal(batch, channels, length), normal(batch, channels, length)
    step = torch.nn.functional.softplus(normal(batch, channels, length) - 2)
    mixer = nn.Module()
    mixer.out_proj = nn.Linear(channels, hidden, bias=False)
    mixer.out_proj.weight.data = normal(hidden, channels)
    return maps, MAMBA.layer_output(mixer), LayerInputs(u, step, gate, None)


def test_states_that_can_do_all_that_others_did_learn_it():
    maps, output, inputs = random_layer()
    twins = [torch.cat([rows, 0.5 * rows]) for rows in (maps.B_rows, maps.C_rows)]
    whole = StateMaps(*twins, torch.cat([maps.A_log, maps.A_log], 1))  # twice the states, two by two alike
    error = OutputError(whole, output, [inputs], sum_over_processes)
    start = whole.kept(torch.arange(4))
    assert error.relative_error(start) > 1e-2
    assert error.relative_error(fit_states(error, error, start, torch.eye(4, dtype=torch.float64))) < 1e-4


def test_the_error_is_that_of_the_layers_output(model, batches):
    """As a share of the energy of what all states add to it, which is the output without the skip connection."""
    layers, batch = state_layers(model), batches[0]
    mixer = layers[1]
    with undisturbed(model):
        plan = analyze(model, with_labels(batches), replace(CONFIG, refit=False)).plan
        whole = layers.family.maps(layers.whole_tensors(1), mixer)
        (inputs,) = layer_inputs(layers, [batch], 1, {})
        error = OutputError(whole, layers.family.layer_output(mixer), [inputs], sum_over_processes)

        seen = {}

        def outputs_of(name, overrides):
            handle = mixer.register_forward_hook(lambda module, args, output: seen.update({name: output}))
            torch.func.functional_call(model, overrides, kwargs={"input_ids": batch["input_ids"], "use_cache": False})
            handle.remove()

        outputs_of("whole", {})
        outputs_of("cut", masked_parameters(layers, {1: plan[1]}))
        without_states = {"backbone.layers.1.mixer.x_proj.weight": torch.zeros_like(mixer.x_proj.weight)}
        outputs_of("none", without_states)  # neither B nor C: what the skip connection gives
    cut, none = ((seen["whole"] - seen[name]).square().sum() for name in ("cut", "none"))
    assert error.relative_error(plan[1].maps_after_cut(whole)) == pytest.approx(float(cut / none), rel=1e-3)


def test_padding_does_not_count():
    maps, output, inputs = random_layer()
    mask = torch.ones(3, 30)
    mask[:, 20:] = 0
    disturbed = replace(inputs, mask=mask, u=inputs.u * (1 + 5 * (1 - mask[:, None])))
    short = LayerInputs(inputs.u[..., :20], inputs.time_step[..., :20], inputs.gate[..., :20], None)
    start = maps.kept(torch.arange(2))
    errors = [OutputError(maps, output, [one], sum_over_processes).relative_error(start) for one in (disturbed, short)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_what_gets_worse_on_other_data_leaves_the_states_as_they_were():
    maps, output, inputs = random_layer()
    start, covariance = maps.kept(torch.arange(2)), torch.eye(2, dtype=torch.float64)
    error = OutputError(maps, output, [inputs], sum_over_processes)
    content = OutputError(start, output, [inputs], sum_over_processes)  # nothing could please it more
    assert fit_states(error, content, start, covariance) is start
    assert fit_states(error, error, start, covariance) is not start


# The refit of a model


def test_a_layer_is_fitted_behind_those_before_it_as_they_will_be(model, batches):
    """Layer 1 by hand: on the inputs that it gets from the refitted layer 0, judged on the held-out ones."""
    layers = state_layers(model)
    mixer = layers[1]
    report = analyze(model, batches, CONFIG)
    plan = {index: replace(entry, refit=None) for index, entry in report.plan.items()}
    with undisturbed(model):
        before = masked_parameters(layers, {0: report.plan[0]})
        inputs = [layer_inputs(layers, some, 1, before) for some in (batches[0:6:3], batches[1:6:3])]
        whole = layers.family.maps(layers.whole_tensors(1), mixer)
        error, judge = (
            OutputError(whole, layers.family.layer_output(mixer), some, sum_over_processes) for some in inputs
        )
        keep, start = plan[1].kept_states, plan[1].maps_after_cut(whole)
        covariance = collect_statistics(layers, batches[0:6:3])[1].gated_covariance
        fitted = fit_states(error, judge, start, covariance[keep][:, keep])
    for added, new, old in zip(report.plan[1].refit, fitted, start, strict=True):
        torch.testing.assert_close(added, new - old, rtol=1e-3, atol=1e-5)


def test_it_lowers_the_loss_and_the_cut_model_has_the_loss_that_was_measured(model, batches):
    plain = analyze(model, batches, replace(CONFIG, refit=False, calibration_batches=6))
    report = analyze(model, batches, CONFIG)
    assert report.is_refitted and not plain.is_refitted and "\nrefitted" in str(report)
    held_out = with_labels(batches[6:])
    with undisturbed(model):
        losses = [
            mean_loss(Objective(model), held_out, masked_parameters(state_layers(model), some.plan))
            for some in (plain, report)
        ]
    event = compress(model, report)
    model.eval()
    with torch.no_grad():
        cut = [model(**batch).loss.item() for batch in held_out]
        measured = [model(**batch).loss.item() for batch in (batches[2], batches[5])]
    assert event.refit and losses[1] < losses[0]
    assert sum(cut) / len(cut) == pytest.approx(losses[1], abs=1e-5)
    assert report.loss_after == pytest.approx(sum(measured) / 2, abs=1e-5)


def test_fitting_judging_and_reporting_are_on_batches_of_their_own(model, batches):
    first = analyze(model, batches[:6], CONFIG)
    for changed in range(3):
        others = list(batches[:6])
        others[changed::3] = batches[7:9]
        report = analyze(model, others, CONFIG)
        is_same = torch.equal(report.plan[0].refit.C_rows, first.plan[0].refit.C_rows)
        assert is_same == (changed == 2)  # other judges stop the fit elsewhere
        assert torch.equal(report.scores[0], first.scores[0]) == (changed != 0)
        assert (report.loss_before == first.loss_before) == (changed != 2)


def test_what_is_judged_by_other_data_stops_elsewhere(model, batches):
    def rows_judged_by(batch):
        given = [batches[0], batch, *batches[2:4], batch, batches[5]]
        return [entry.refit and entry.refit.C_rows for entry in analyze(model, given, CONFIG).plan.values()]

    monotonous = {"input_ids": batches[1]["input_ids"][:1, :1].repeat(8, 32)}  # one token for ever
    usual, other = rows_judged_by(batches[1]), rows_judged_by(*with_labels([monotonous]))
    assert all(rows is not None for rows in usual)
    assert any(rows is not None and not torch.equal(rows, left) for rows, left in zip(other, usual, strict=True))


def test_what_does_not_help_on_held_out_data_is_not_kept(model, batches):
    config = replace(CONFIG, refit=False)
    plan = analyze(model, batches, config).plan
    covariances = {index: torch.eye(16, dtype=torch.float64) for index in plan}
    narrow = [{"input_ids": torch.full((1, 2), 7), "labels": torch.full((1, 2), 7)}]  # nothing to learn the rest from
    objective = Objective(model)
    with undisturbed(model):
        assert refitted(state_layers(model), plan, covariances, objective, narrow, with_labels(batches[:2])) == plan
        data = with_labels(batches[:2]), with_labels(batches[2:4])
        helped = refitted(state_layers(model), plan, covariances, objective, *data)
    assert helped != plan and all(entry.refit is not None for entry in helped.values())


def test_it_is_the_same_every_time_and_disturbs_nothing(model, batches):
    model.train()
    before = weights_of(model)
    torch.manual_seed(3)
    plans = [analyze(model, batches, CONFIG).plan for _ in range(2)]
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3)) and model.training
    assert_identical(before, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    for first, second in zip(*(plan.values() for plan in plans), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.refit, second.refit, strict=True))


def test_half_precision_weights_are_refitted_after_training(model, batches):
    model = model.to(torch.bfloat16)
    report = analyze(model, batches, CONFIG)
    compress(model, report)
    assert report.is_refitted and model.dtype == torch.bfloat16
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.item() for batch in (batches[2], batches[5])]
    assert sum(losses) / 2 == pytest.approx(report.loss_after, abs=2e-2)


def test_refitted_tensors_go_on_learning_with_the_moments_of_the_kept_ones(trained, batches):
    model, optimizer = trained
    report = analyze(model, batches, CONFIG)
    before = optimizer.state[model.backbone.layers[0].mixer.A_log]["exp_avg_sq"]
    compress(model, report, optimizer)
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(optimizer.state[mixer.A_log]["exp_avg_sq"], before[:, report.kept_states[0]])
    start = mixer.A_log.detach().clone(), mixer.x_proj.weight.detach().clone()
    train_steps(model, optimizer, batches[:1])
    assert (mixer.A_log != start[0]).all() and (mixer.x_proj.weight != start[1]).all()


def test_companions_get_the_same_additions(model, batches):
    companion = copy.deepcopy(model)
    with torch.no_grad():
        companion.backbone.layers[0].mixer.A_log.add_(0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=0.0)
    compress(model, analyze(model, batches, CONFIG), optimizer, companions=[companion])
    decays = [some.backbone.layers[0].mixer.A_log for some in (model, companion)]
    torch.testing.assert_close(decays[1], decays[0] + 0.5)


def test_a_loss_budget_goes_further_with_it(model, batches):
    config = CompreSSMConfig(loss_budget=0.002, calibration_batches=9)
    sizes = [analyze(model, batches, replace(config, refit=refit)).state_sizes[0] for refit in (False, True)]
    assert sizes[1] < sizes[0] <= 16


def test_what_cannot_be_refitted_is_refused():
    with pytest.raises(ValueError, match="calibration_batches = 2; allowed: at least 3 with refit = True"):
        CompreSSMConfig(tolerance=0.1, refit=True, calibration_batches=2)
    lru = LRUForSequenceClassification(LRUConfig(state_size=8, hidden_size=4, num_hidden_layers=1, num_labels=2))
    with pytest.raises(ValueError, match="refit = True; a model of type 'lru' is balanced instead: leave it out"):
        analyze(lru, None, CompreSSMConfig(tolerance=0.1, refit=True))
