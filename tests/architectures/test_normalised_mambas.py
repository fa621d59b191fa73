"""FalconMamba and Jamba normalise B and C over the states, so that to drop some changes what is left of the others."""

import copy
import math

import pytest
import torch
from conftest import assert_identical, train_steps, weights_of
from mamba1_models import build_falcon_mamba, build_jamba
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba

from hf_compressm import CompreSSMConfig, analyze, compress, install_scan, parameter_groups, uninstall_scan
from hf_compressm.analysis.activations import layer_inputs
from hf_compressm.analysis.output_fit import OutputError, fit_states
from hf_compressm.analysis.refit import whole_maps
from hf_compressm.architectures import registry, state_layers
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state, shrink_state
from hf_compressm.theory.criteria import CRITERIA
from hf_compressm.theory.plan import Selection

BUILDERS = {"falcon_mamba": build_falcon_mamba, "jamba": build_jamba}
MODULES = {"falcon_mamba": modeling_falcon_mamba, "jamba": modeling_jamba}


@pytest.fixture(params=BUILDERS)
def model(request):
    return BUILDERS[request.param]()


@pytest.fixture
def trained(model, batches):
    train_steps(model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3), batches)
    return model.eval()


@torch.no_grad()
def logits_of(model, ids, **arguments) -> torch.Tensor:
    return model.eval()(input_ids=ids, **arguments).logits


@torch.no_grad()
def make_twins(model) -> None:
    """Let the second half of the states of each layer do what the first half does."""
    layers = state_layers(model)
    for index, mixer in layers.items():
        maps = layers.family.maps(layers.parameters(index), mixer)
        half = layers.sizes[index] // 2
        maps.A_log.copy_((torch.rand(maps.A_log.shape) * 3).log())
        maps.A_log[:, half:] = maps.A_log[:, :half]
        for of_states in (maps.B_rows, maps.C_rows, maps.B_weights, maps.C_weights):
            if of_states is not None:
                of_states[half:] = of_states[:half]


def first_half(layer) -> torch.Tensor:
    """A criterion that prefers the first half of the states."""
    size = len(layer.B_rows)
    return 1.0 + (torch.arange(size) < size // 2).double()


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


def test_a_second_cut_composes(trained, batches):
    for size, refit in ((10, False), (4, True)):
        config = CompreSSMConfig(target_state_size=size, refit=refit, calibration_batches=9 if refit else 8)
        report = analyze(trained, batches, config)
        compress(trained, report)
        held_out = batches[2:9:3] if refit else batches[1:8:2]
        with torch.no_grad():
            measured = sum(trained.eval()(**batch).loss.item() for batch in held_out) / len(held_out)
        assert measured == pytest.approx(report.loss_after, abs=2e-5)


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


@pytest.mark.parametrize("criterion", [*CRITERIA, first_half])
def test_every_score_ranks_the_states(trained, batches, criterion):
    before = weights_of(trained)
    report = analyze(trained, batches, CompreSSMConfig(target_state_size=4, criterion=criterion))
    assert all(len(scores.unique()) > 1 for scores in report.scores.values())
    assert_identical(weights_of(trained), before)
    assert set(state_layers(trained).sizes.values()) == {16}


def test_padding_leaves_the_function_alone_and_growth_is_refused(trained, batches):
    expected = logits_of(trained, batches[0]["input_ids"])
    pad_state(trained, 24)
    assert set(state_layers(trained).sizes.values()) == {24}
    torch.testing.assert_close(logits_of(trained, batches[0]["input_ids"]), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot grow"):
        grow_state(trained, 32)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_padded_batch_is_what_its_sequences_are_alone_and_a_cache_changes_nothing(trained, batches, is_cut):
    if is_cut:
        compress(trained, analyze(trained, batches, CompreSSMConfig(target_state_size=5)))
    ids = batches[0]["input_ids"][:3, :12]
    padded = torch.cat([torch.zeros(3, 4, dtype=ids.dtype), ids], 1)
    mask = (torch.arange(16) >= 4).long().expand(3, 16)
    together = logits_of(trained, padded, attention_mask=mask)[:, 4:]
    torch.testing.assert_close(together, logits_of(trained, ids), rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = trained.generate(ids, use_cache=True, **options)
    assert torch.equal(generated, trained.generate(ids, use_cache=False, **options))
    assert torch.equal(logits_of(trained, generated, use_cache=False)[:, 11:-1].argmax(-1), generated[:, 12:])


def test_the_scan_is_installed_in_it_and_changes_nothing(model, batches):
    module, ids = MODULES[model.config.model_type], batches[0]["input_ids"]
    uninstall_scan()
    function, expected = module.mamba_selective_scan, logits_of(model, ids)
    family = registry.family_of(model)
    assert family.title in family.slow_scan("cpu")
    install_scan()
    assert family.slow_scan("cpu") is None and module.mamba_selective_scan is not function
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    uninstall_scan()
    assert module.mamba_selective_scan is function


def test_weights_that_come_in_parts_are_adopted(model, batches):
    target = copy.deepcopy(model)
    train_steps(model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3), batches[:2])
    compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6)))
    weights = weights_of(model)
    later = {name: weights[name] for name in weights if name.endswith(("x_proj.weight", "A_log", "layernorm.weight"))}
    adopt_checkpoint_sizes(target)
    for part in ({name: weights[name] for name in weights.keys() - later.keys()}, later):
        target.load_state_dict(part, strict=False)
    assert_identical(weights_of(target), weights)


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
