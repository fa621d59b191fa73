"""FalconMamba and Jamba normalise B and C over the states, so that to drop some changes what is left of the others."""

import copy
import math

import pytest
import torch
from mamba1_models import BUILDERS, build_jamba, first_half, logits_of, make_twins, trained_on

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.analysis.activations import layer_inputs
from hf_compressm.analysis.output_fit import OutputError, fit_states
from hf_compressm.analysis.refit import whole_maps
from hf_compressm.architectures import registry, state_layers
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state, shrink_state
from hf_compressm.theory.plan import Selection


@pytest.fixture(params=["falcon_mamba", "jamba"])
def model(request):
    return BUILDERS[request.param]()


@pytest.fixture
def trained(model, batches):
    return trained_on(model, batches)


def test_what_a_smaller_norm_changes_is_made_up_for_exactly_where_it_can_be(model, batches):
    make_twins(model)
    ids, expected = batches[0]["input_ids"], logits_of(model, batches[0]["input_ids"])
    uncompensated = copy.deepcopy(model)
    selection = Selection(torch.arange(8), torch.eye(8, dtype=torch.float64), norm_gains=torch.tensor([1.0, 2.0]))
    shrink_state(model, dict.fromkeys(state_layers(model), selection))
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-5, atol=1e-5)
    shrink_state(uncompensated, dict.fromkeys(state_layers(uncompensated), Selection(torch.arange(8))))
    assert (logits_of(uncompensated, ids) - expected).abs().max() > 1e-4


def test_these_factors_are_found_on_data(model, batches):
    make_twins(model)
    report = analyze(model, batches, CompreSSMConfig(target_state_size=8, criterion=first_half))
    for selection in report.plan.values():
        assert selection.kept_states.tolist() == list(range(8))
        torch.testing.assert_close(selection.norm_gains, torch.tensor([1.0, 2.0]).double(), rtol=0.02, atol=0)
    expected = logits_of(model, batches[0]["input_ids"])
    compress(model, report)
    torch.testing.assert_close(logits_of(model, batches[0]["input_ids"]), expected, rtol=1e-3, atol=1e-3)


def test_a_kept_share_sets_the_factor(model, batches):
    """Without compensation a B and a C that keep a share s of their squares are multiplied by √(s N / r)."""
    make_twins(model)
    config = CompreSSMConfig(target_state_size=8, criterion=first_half, compensate=False)
    for selection in analyze(model, batches, config).plan.values():
        torch.testing.assert_close(selection.norm_gains, torch.full((2,), math.sqrt(0.5 * 16 / 8)).double())


def test_a_refit_moves_all_that_makes_the_kept_states_and_lowers_the_error(trained, batches):
    layers, analysed = state_layers(trained), CompreSSMConfig(target_state_size=3)
    plan = analyze(trained, batches, analysed).plan
    whole, output = whole_maps(layers, 0), layers.family.layer_output(layers[0])
    start = plan[0].maps_after_cut(whole)
    with torch.no_grad():
        inputs = [layer_inputs(layers, some, 0, {}) for some in (batches[:4], batches[4:8])]
    errors = [OutputError(whole, output, some, lambda tensors: None) for some in inputs]
    fitted = fit_states(*errors, start, torch.eye(3, dtype=torch.float64))
    assert errors[1].relative_error(fitted) < 0.9 * errors[1].relative_error(start)
    assert all(not torch.equal(new, old) for new, old in zip(fitted, start, strict=True))
    assert len(list(fitted)) == (4 if fitted.B_weights is None else 5)


def test_padding_leaves_the_function_alone_and_growth_is_refused(trained, batches):
    expected = logits_of(trained, batches[0]["input_ids"])
    pad_state(trained, 24)
    assert set(state_layers(trained).sizes.values()) == {24}
    torch.testing.assert_close(logits_of(trained, batches[0]["input_ids"]), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot grow"):
        grow_state(trained, 32)


def test_losses_of_a_mixture_of_experts_leave_its_routers_out(batches):
    model = build_jamba().eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches[1:4:2]]
    model.config.output_router_logits = True
    report = analyze(model, batches, CompreSSMConfig(target_state_size=6))
    assert report.loss_before == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert model.config.output_router_logits is True
    assert model(**batches[1]).loss.item() > losses[0] + 1e-4
    compress(model, report)
    assert state_layers(model).sizes == {0: 6, 2: 6, 3: 6}


@pytest.mark.parametrize("change", [{"attn_layer_period": 0}, {"attn_layer_offset": "one"}])
def test_a_config_that_does_not_say_which_layers_have_a_state_is_refused(change):
    config = build_jamba().config.to_dict()
    assert registry.FAMILIES["jamba"].layers_of_config(config) == [0, 2, 3]
    with pytest.raises(ValueError, match="attn_layer_period = .*attn_layer_offset = "):
        registry.FAMILIES["jamba"].layers_of_config(config | change)
