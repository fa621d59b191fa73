"""A state tensor is a parameter of one layer: what is shared or computed is refused, and nothing changes."""

import copy

import pytest
import torch
from conftest import assert_identical, build_model, train_steps, weights_of
from torch import nn
from torch.nn.utils import parametrize, prune

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import state_layers
from hf_compressm.surgery.checks import check_state_tensors
from hf_compressm.surgery.shrink_and_grow import pad_state

CONFIG = CompreSSMConfig(target_state_size=6, calibration_batches=2)


def mixers_of(model) -> list[nn.Module]:
    return [block.mixer for block in model.backbone.layers]


def share_parameter(model):
    first, second = mixers_of(model)
    second.A_log = first.A_log


def share_memory(model):
    first, second = mixers_of(model)
    second.A_log.data = first.A_log.data


def share_projection(model):
    first, second = mixers_of(model)
    second.x_proj = first.x_proj


def share_mixer(model):
    first, second = model.backbone.layers
    second.mixer = first.mixer


def use_a_block_twice(model):
    model.backbone.layers[1] = model.backbone.layers[0]


def copy_a_block(model):
    model.backbone.layers[1] = copy.deepcopy(model.backbone.layers[0])


def use_elsewhere(model):
    model.backbone.probe = nn.Linear(64, 34, bias=False)
    model.backbone.probe.weight = mixers_of(model)[1].x_proj.weight


def use_twice_in_its_module(model):
    mixers_of(model)[1].decay = mixers_of(model)[1].A_log


def keep_in_a_buffer(model):
    model.register_buffer("decay", mixers_of(model)[0].A_log.detach())


LAYERS = "backbone.layers"
SHARED = {
    share_parameter: rf"{LAYERS}\.0\.mixer\.A_log and {LAYERS}\.1\.mixer\.A_log are one tensor",
    share_memory: rf"{LAYERS}\.0\.mixer\.A_log and {LAYERS}\.1\.mixer\.A_log are one tensor",
    share_projection: rf"{LAYERS}\.0\.mixer\.x_proj\.weight and {LAYERS}\.1\.mixer\.x_proj\.weight are one tensor",
    share_mixer: rf"{LAYERS}\.0 and {LAYERS}\.1 run the same MambaMixer",
    use_a_block_twice: rf"{LAYERS}\.0 and {LAYERS}\.1 run the same MambaMixer",
    copy_a_block: rf"{LAYERS}\.0\.mixer and {LAYERS}\.1\.mixer both have layer_idx = 0",
    use_elsewhere: rf"{LAYERS}\.1\.mixer\.x_proj\.weight and backbone\.probe\.weight are one tensor",
    use_twice_in_its_module: rf"{LAYERS}\.1\.mixer\.A_log and {LAYERS}\.1\.mixer\.decay are one tensor",
    keep_in_a_buffer: rf"{LAYERS}\.0\.mixer\.A_log and decay are one tensor",
}


def everything_of(model) -> tuple[dict, list, dict]:
    """Copies of the weights, the parameters themselves by name, and the config."""
    return weights_of(model), list(model.named_parameters(remove_duplicate=False)), model.config.to_dict()


def assert_unchanged(model, before) -> None:
    weights, parameters, config = everything_of(model)
    assert_identical(weights, before[0])
    assert all(left[0] == right[0] and left[1] is right[1] for left, right in zip(parameters, before[1], strict=True))
    assert config == before[2]


@pytest.mark.parametrize("share", SHARED, ids=lambda share: share.__name__)
def test_shared_states_are_refused_by_name_and_nothing_is_changed(share, batches):
    model, message = build_model(), SHARED[share]
    report = analyze(model, batches, CONFIG)
    share(model)
    optimizer = torch.optim.AdamW(model.parameters())
    before = everything_of(model)
    with pytest.raises(ValueError, match=message):
        analyze(model, batches, CONFIG)
    with pytest.raises(ValueError, match=message):
        check_state_tensors(state_layers(model), optimizer)  # as the callback does, when training starts
    if len(state_layers(model)) == 2:
        with pytest.raises(ValueError, match=message):
            compress(model, report, optimizer)
    with pytest.raises(ValueError, match=message):
        pad_state(model, 20)
    assert_unchanged(model, before)


def share_what_has_no_states(model):
    first, second = mixers_of(model)
    second.in_proj, second.D = first.in_proj, first.D
    model.encoder = model.backbone  # another name for the whole
    assert model.lm_head.weight is model.backbone.embeddings.weight


def lie_side_by_side(model):
    """All parameters are views of one tensor, as some loaders and optimizers arrange them."""
    whole = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), whole.split([p.numel() for p in model.parameters()]), strict=True):
        parameter.data = part.view(parameter.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_analysis_leaves_modules_with_two_names_as_they_are(dtype, batches):
    model = build_model().to(dtype)
    share_what_has_no_states(model)
    before = everything_of(model)
    analyze(model, batches, CONFIG)
    assert_unchanged(model, before)


@pytest.mark.parametrize("share", [share_what_has_no_states, lie_side_by_side])
def test_other_sharing_is_normal(share, batches):
    model = build_model()
    share(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_steps(model, optimizer, batches[:2])
    compress(model, analyze(model, batches, CONFIG), optimizer)
    assert {tuple(mixer.A_log.shape) for mixer in mixers_of(model)} == {(64, 6)}
    train_steps(model, optimizer, batches[:2])


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


COMPUTED = {  # (what makes it so, layer and tensor, the remedy)
    "parametrized projection": (
        lambda mixer: parametrize.register_parametrization(mixer.x_proj, "weight", Doubled()),
        r"layer 1: x_proj\.weight .*remove_parametrizations\(…, 'weight'\) on the Linear first",
    ),
    "parametrized decay": (
        lambda mixer: parametrize.register_parametrization(mixer, "A_log", Doubled()),
        r"layer 1: A_log .*remove_parametrizations\(…, 'A_log'\) on the MambaMixer first",
    ),
    "weight norm": (
        lambda mixer: nn.utils.parametrizations.weight_norm(mixer.x_proj),
        r"layer 1: x_proj\.weight .*remove_parametrizations\(…, 'weight'\) on the Linear first",
    ),
    "pruned": (
        lambda mixer: prune.l1_unstructured(mixer.x_proj, "weight", amount=0.3),
        r"layer 1: x_proj\.weight .*prune\.remove\(…, 'weight'\) on the Linear first",
    ),
    "spectral norm of before": (
        lambda mixer: nn.utils.spectral_norm(mixer.x_proj),
        r"layer 1: x_proj\.weight .* remove_spectral_norm\(…, 'weight'\) on the Linear first",
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_state_tensor_that_is_computed_from_others_is_refused_with_the_remedy(kind, batches):
    make, message = COMPUTED[kind]
    model = build_model()
    report = analyze(model, batches, CONFIG)
    make(mixers_of(model)[1])
    before = everything_of(model)
    for refused in (lambda: analyze(model, batches, CONFIG), lambda: compress(model, report)):
        with pytest.raises(ValueError, match=message):
            refused()
    assert_unchanged(model, before)


def test_a_parametrization_of_what_has_no_states_is_none_of_our_business(batches):
    model = build_model()
    for mixer in mixers_of(model):
        parametrize.register_parametrization(mixer, "D", Doubled())
        prune.l1_unstructured(mixer.in_proj, "weight", amount=0.3)
    report = analyze(model, batches, CONFIG)
    compress(model, report)
    assert {tuple(mixer.A_log.shape) for mixer in mixers_of(model)} == {(64, 6)}
    assert model(**batches[1]).loss.item() == pytest.approx(report.loss_after, abs=0.1)
