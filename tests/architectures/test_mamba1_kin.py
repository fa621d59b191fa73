"""Mamba-1's kin, FalconMamba, Jamba and Zamba: what holds for all of them."""

import copy

import pytest
import torch
from conftest import assert_identical, weights_of
from mamba1_models import BUILDERS, first_half, logits_of, trained_on

from hf_compressm import CompreSSMConfig, analyze, compress, install_scan, uninstall_scan
from hf_compressm.architectures import registry, state_layers
from hf_compressm.architectures.selective.mamba_scan import MODULES
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes
from hf_compressm.theory.criteria import CRITERIA


@pytest.fixture(params=BUILDERS)
def model(request):
    return BUILDERS[request.param]()


@pytest.fixture
def trained(model, batches):
    return trained_on(model, batches)


def test_a_second_cut_composes(trained, batches):
    for size, refit in ((10, False), (4, True)):
        config = CompreSSMConfig(target_state_size=size, refit=refit, calibration_batches=9 if refit else 8)
        report = analyze(trained, batches, config)
        compress(trained, report)
        held_out = batches[2:9:3] if refit else batches[1:8:2]
        with torch.no_grad():
            measured = sum(trained.eval()(**batch).loss.item() for batch in held_out) / len(held_out)
        assert measured == pytest.approx(report.loss_after, abs=2e-5)


@pytest.mark.parametrize("criterion", [*CRITERIA, first_half])
def test_every_score_ranks_the_states(trained, batches, criterion):
    before = weights_of(trained)
    report = analyze(trained, batches, CompreSSMConfig(target_state_size=4, criterion=criterion))
    assert all(len(scores.unique()) > 1 for scores in report.scores.values())
    assert_identical(weights_of(trained), before)
    assert set(state_layers(trained).sizes.values()) == {16}


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
    trained_on(model, batches[:2])
    compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6)))
    weights = weights_of(model)
    endings = ("x_proj.weight", "x_proj_weight", "A_log", "layernorm.weight")
    later = {name: weights[name] for name in weights if name.endswith(endings)}
    adopt_checkpoint_sizes(target)
    for part in ({name: weights[name] for name in weights.keys() - later.keys()}, later):
        target.load_state_dict(part, strict=False)
    assert_identical(weights_of(target), weights)
