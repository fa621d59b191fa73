"""Layers with scalar decay are observed, scored, cut in either basis, and refitted."""

import copy

import pytest
import torch
from scalar_decay_models import CONFIGS, build_scalar_decay
from torch.nn.functional import cross_entropy
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from hf_compressm import CompreSSMConfig, analyze, compress, parameter_groups
from hf_compressm.analysis.calibration import undisturbed
from hf_compressm.analysis.group_statistics import collect_group_statistics, group_layer_inputs
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.kernels.scalar_decay_scan import scalar_decay_scan
from hf_compressm.theory.group_criteria import GROUP_CRITERIA

EVERY_FAMILY = pytest.mark.parametrize("model_type", CONFIGS)
BASES = pytest.mark.parametrize("basis", ["axis", "balanced"])


@pytest.fixture
def falcon_with_norm():
    return build_scalar_decay(model_type="falcon_h1", mamba_rms_norm=True, mamba_norm_before_gate=True)


def mixer_outputs(model, batch) -> dict[int, torch.Tensor]:
    """What each mixer adds to the residual stream, by layer."""
    outputs, layers = {}, state_layers(model)
    handles = [
        mixer.register_forward_hook(lambda module, args, output, index=index: outputs.update({index: output}))
        for index, mixer in layers.items()
    ]
    with undisturbed(model):
        model(**batch)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("length", [5, 64, 150])
def test_the_scan_is_that_of_transformers(length):
    torch.manual_seed(0)
    x, B, C = (torch.randn(2, length, *shape, dtype=torch.float64) for shape in ((4, 3), (2, 5), (2, 5)))
    time_step, A = torch.rand(2, length, 4, dtype=torch.float64), -torch.rand(4, dtype=torch.float64)
    expected = mamba2_chunk_scan(x.float(), time_step.float(), A.float(), B.float(), C.float(), chunk_size=16)
    torch.testing.assert_close(scalar_decay_scan(x, time_step, A, B, C).float(), expected, rtol=1e-4, atol=1e-5)


@EVERY_FAMILY
def test_a_layer_is_computed_from_its_maps_as_the_mixer_computes_it(model_type, batches):
    check_layer_output(build_scalar_decay(model_type=model_type), batches)


def test_so_is_one_that_normalises_before_it_gates(falcon_with_norm, batches):
    check_layer_output(falcon_with_norm, batches)


def check_layer_output(model, batches):
    layers, (index, mixer) = state_layers(model), list(state_layers(model).items())[-1]
    with torch.no_grad():
        for parameter in mixer.norm.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    expected = mixer_outputs(model, batches[0])[index]
    with undisturbed(model):
        (inputs,) = group_layer_inputs(layers, batches[:1], index, {})
    maps = layers.family.channel_maps(mixer, layers.whole_tensors(index))
    with torch.no_grad():
        given = layers.family.layer_output(mixer)(maps, inputs).mT
    torch.testing.assert_close(given, expected - (0 if mixer.out_proj.bias is None else mixer.out_proj.bias))


def test_weights_of_channels_are_those_of_small_errors(batches):
    """An error of ε in one channel of the scan's output makes ε² w in the layer's, radial part of the norm aside."""
    model = build_scalar_decay().double()
    layers, mixer = state_layers(model), state_layers(model)[0]
    with undisturbed(model):
        (inputs,) = group_layer_inputs(layers, batches[:1], 0, {})
    y, gate = torch.randn(1, 1, 64, dtype=torch.float64), inputs.gate[:1, :1]
    weights = layers.family.channel_weights(mixer)(y, gate)
    for channel in (0, 40):
        error = torch.zeros_like(y)
        error[..., channel] = 1e-5
        with torch.no_grad():
            change = mixer.out_proj(mixer.norm(y + error, gate)) - mixer.out_proj(mixer.norm(y, gate))
        measured = change.square().sum() / 1e-10
        assert measured == pytest.approx(float(weights[0, 0, channel]), rel=0.35)


def test_left_padding_does_not_count(batches):
    model, padding = build_scalar_decay(), torch.zeros(8, 16, dtype=torch.long)
    ids = batches[0]["input_ids"][:, :16]
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    padded = {"input_ids": torch.cat([padding, ids], 1), "attention_mask": mask}
    with undisturbed(model):
        found = [collect_group_statistics(state_layers(model), [b])[1] for b in ({"input_ids": ids}, padded)]
    for name, value in vars(found[0]).items():
        torch.testing.assert_close(getattr(found[1], name), value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("criterion", GROUP_CRITERIA)
def test_every_criterion_makes_a_plan(criterion, batches):
    model = build_scalar_decay()
    report = analyze(model, batches, CompreSSMConfig(target_state_size=6, criterion=criterion))
    assert report.criterion == criterion and not report.compensate
    assert all(kept.shape == (2, 6) for kept in report.kept_states.values())
    compress(model, report)
    assert set(state_sizes(model).values()) == {6}


def test_taylor_is_the_first_order_change_of_the_loss(batches):
    """A small step of a state's taps and biases towards zero changes the loss by that share of its score."""
    model = build_scalar_decay().double()
    config = CompreSSMConfig(target_state_size=6, criterion="taylor", calibration_batches=2)
    scores = analyze(model, batches, config).scores[1]
    layers, mixer = state_layers(model), state_layers(model)[1]
    batch = batches[0]  # the one for statistics

    def loss() -> float:
        with torch.no_grad():
            return model.eval()(**batch).loss.item()

    before, state = loss(), int(scores[1].argmax())
    with torch.no_grad():
        for path in ("conv1d.weight", "conv1d.bias"):
            tensor = mixer.get_parameter(path)
            for name in ("B", "C"):
                tensor[layers.family.block_slice(mixer, path, name)][16 + state] *= 0.98
    assert abs(loss() - before) / 0.02 == pytest.approx(float(scores[1, state]), rel=0.1)


@BASES
def test_an_analysis_leaves_the_model_as_it_was(basis, batches):
    model = build_scalar_decay()
    before, kind = copy.deepcopy(model.state_dict()), type(model)
    analyze(model, batches, CompreSSMConfig(target_state_size=6, basis=basis, refit=True))
    assert type(model) is kind and model.config.model_type == "mamba2"
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def remembered_loss(model, batch) -> tuple[torch.Tensor, int]:
    """The loss of repeating what was read six symbols ago, further than the convolution sees."""
    logits, targets = model(input_ids=batch["input_ids"]).logits[:, 6:], batch["input_ids"][:, :-6]
    return cross_entropy(logits.flatten(0, 1), targets.flatten()), targets.numel()


def symbols(count: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": ids} for ids in torch.randint(8, (count, 16, 32), generator=generator)]


def build_remembering():
    return build_scalar_decay(vocab_size=8, num_hidden_layers=1)


@pytest.fixture(scope="module")
def remembering_weights():
    model = build_remembering()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    for batch in symbols(200, seed=1):
        remembered_loss(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(model.state_dict())


@pytest.fixture
def remembering(remembering_weights):
    """A Mamba-2 that has to remember, so that a cut costs something."""
    model = build_remembering()
    model.load_state_dict(remembering_weights)
    return model


def cut_report(model, size: int = 6, **options):
    config = CompreSSMConfig(target_state_size=size, calibration_batches=9, **options)
    return analyze(model, symbols(9, seed=2), config, loss=remembered_loss)


def held_out_loss(model, refit: bool) -> float:
    """The loss on the batches on which reports measure it."""
    with torch.no_grad():
        batches = symbols(9, seed=2)[2::3] if refit else symbols(9, seed=2)[1::2]
        return sum(remembered_loss(model.eval(), batch)[0].item() for batch in batches) / len(batches)


@BASES
def test_a_refit_lowers_the_loss_to_what_was_measured(basis, remembering):
    plain, refitted = (cut_report(remembering, basis=basis, refit=refit) for refit in (False, True))
    assert refitted.is_refitted and not plain.is_refitted
    assert refitted.loss_after - refitted.loss_before < 0.8 * (plain.loss_after - plain.loss_before)
    compress(remembering, refitted)
    assert held_out_loss(remembering, refit=True) == pytest.approx(refitted.loss_after, abs=1e-4)


def test_a_second_balanced_cut_is_refitted_behind_the_first(remembering):
    compress(remembering, cut_report(remembering, 10, basis="balanced"))
    report = cut_report(remembering, 6, refit=True)
    assert report.is_refitted
    compress(remembering, report)
    assert held_out_loss(remembering, refit=True) == pytest.approx(report.loss_after, abs=1e-4)


def test_balanced_states_lose_less_than_coordinates(remembering):
    axis, balanced = (cut_report(remembering, basis=basis) for basis in ("axis", "balanced"))
    assert axis.loss_before + 0.1 < balanced.loss_after < axis.loss_after - 0.1


@pytest.mark.parametrize("goal", [{"tolerance": 0.05}, {"loss_budget": 0.05}, {"cut_fraction": 0.5}], ids=str)
def test_a_balanced_model_gives_each_layer_its_own_size(goal, batches):
    model = build_scalar_decay()
    report = analyze(model, batches, CompreSSMConfig(basis="balanced", **goal))
    for index, share in report.score_discarded.items():
        sigma, kept = report.hankel_singular_values[index], report.state_sizes[index]
        assert share == pytest.approx(float(sigma[kept:].square().sum() / sigma.square().sum()), abs=1e-9)
    compress(model, report)
    assert state_sizes(model) == report.state_sizes != {0: 16, 1: 16}


def test_a_global_allocation_meets_the_mean_size(batches):
    config = CompreSSMConfig(target_state_size=6, basis="balanced", allocation="global")
    assert sum(analyze(build_scalar_decay(), batches, config).state_sizes.values()) <= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "axis", "allocation": "per_layer"}, "knows one for all. Set allocation='uniform', or basis='bal"),
        ({"criterion": "aire"}, "criterion = 'aire'; allowed for model type 'mamba2': output, ghost"),
        ({"skip_layers": [0]}, "skip_layers"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, batches):
    with pytest.raises(ValueError, match=message):
        analyze(build_scalar_decay(), batches, CompreSSMConfig(target_state_size=6, **options))


def test_a_basis_that_a_model_does_not_have_is_refused(batches):
    model = build_scalar_decay(model_type="compressm_mamba2")
    with pytest.raises(ValueError, match="basis = 'axis'; a model of type 'compressm_mamba2' has balanced"):
        analyze(model, batches, CompreSSMConfig(target_state_size=6, basis="axis"))
    with pytest.raises(ValueError, match="criterion = 'ghost'; the states .* are ranked by their Hankel"):
        analyze(model, batches, CompreSSMConfig(target_state_size=6, criterion="ghost"))
    with pytest.raises(ValueError, match=r"criterion = 'ghost'; allowed: none with basis = 'balanced'"):
        CompreSSMConfig(target_state_size=6, criterion="ghost", basis="balanced")


def test_an_adapter_on_the_projection_is_refused(batches):
    class LoraLinear(torch.nn.Linear):
        pass

    model = build_scalar_decay()
    mixer = state_layers(model)[1]
    mixer.in_proj = LoraLinear(32, mixer.in_proj.out_features, bias=False)
    with pytest.raises(ValueError, match=r"layer 1: in_proj\.weight belongs to a .*LoraLinear, .*Merge adapters"):
        analyze(model, batches, CompreSSMConfig(target_state_size=6))
