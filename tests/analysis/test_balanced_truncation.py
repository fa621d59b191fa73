"""Balanced truncation of an LRU's layers, from the weights alone: its spectrum, its error bound, its odd cases."""

import math

import pytest
import torch
from conftest import assert_identical, build_lru, random_state, systems_of, weights_of

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.theory.hankel import error_bound, gramians, hankel_singular_values

N = 16


def gains(*systems: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Largest singular value of G_1 - G_2 - … on a grid of frequencies that has all resonances."""
    phases = torch.cat([torch.linspace(0, 2 * math.pi, 400, dtype=torch.float64)] + [s[0].angle() for s in systems])
    z = torch.polar(torch.ones_like(phases), phases)
    responses = [(C / (z[:, None, None] - eigenvalues)) @ B for eigenvalues, B, C in systems]
    return torch.linalg.matrix_norm(responses[0] - sum(responses[1:]), 2) if responses[1:] else responses[0]


def test_the_spectrum_is_that_of_the_dense_lyapunov_equations(lru):
    report = analyze(lru, None, CompreSSMConfig(target_state_size=5))
    for index, (eigenvalues, B, C) in enumerate(systems_of(lru)):
        expected = hankel_singular_values(*gramians(torch.diag(eigenvalues), B, C))
        assert report.scores[index].shape == (N,) and (report.scores[index].diff() <= 0).all()
        torch.testing.assert_close(report.hankel_singular_values[index], expected, rtol=1e-6, atol=1e-6)


def test_an_analysis_of_the_weights_needs_no_data_and_changes_nothing(lru):
    lru.train()
    lru.model.layers[0].eval()
    lru(input_ids=torch.arange(8).view(1, 8), labels=torch.tensor([1])).loss.backward()
    modes = [module.training for module in lru.modules()]
    gradients = {name: parameter.grad.clone() for name, parameter in lru.named_parameters()}
    before, config, random = weights_of(lru), lru.config.to_dict(), random_state()
    parameters = list(lru.parameters())
    report = analyze(lru, None, CompreSSMConfig(tolerance=0.05, selection="random"))

    assert random_state() == random and lru.config.to_dict() == config
    assert [module.training for module in lru.modules()] == modes
    assert all(left is right for left, right in zip(lru.parameters(), parameters, strict=True))
    assert_identical(weights_of(lru), before)
    assert_identical({name: parameter.grad for name, parameter in lru.named_parameters()}, gradients)
    assert (report.criterion, report.compensate, report.tokens, report.measuring_seconds) == ("hankel", False, 0, 0)
    assert (report.loss_before, report.loss_after, report.single_layer_loss_change) == (None, None, {})
    assert report.state_sizes_before == {0: N, 1: N} and report.is_cut and not report.applied
    assert "score discarded" in str(report) and "loss" not in str(report)


@pytest.mark.parametrize("goal", [{"target_state_size": 1}, {"target_state_size": 6}, {"tolerance": 0.05}])
def test_every_cut_layer_keeps_to_the_error_bound_at_all_frequencies(lru, goal):
    whole, D = systems_of(lru), [mixer.D.clone() for mixer in state_layers(lru).values()]
    report = analyze(lru, None, CompreSSMConfig(**goal))
    compress(lru, report)
    for index, mixer in state_layers(lru).items():
        sigma, rank = report.scores[index], mixer.state_size
        reduced = systems_of(lru)[index]
        error, scale = (
            gains(whole[index], reduced).max(),
            gains(whole[index], (reduced[0], 0 * reduced[1], reduced[2])),
        )
        assert rank == len(reduced[0]) < N and torch.equal(mixer.D, D[index])
        assert 0.98 * sigma[rank] <= error <= error_bound(sigma, rank) + 1e-5 * scale.max()


def test_two_cuts_keep_to_the_sum_of_their_bounds(lru):
    whole, bounds = systems_of(lru), [0.0, 0.0]
    for size in (9, 4):
        report = analyze(lru, None, CompreSSMConfig(target_state_size=size))
        bounds = [bound + error_bound(report.scores[i], size) for i, bound in enumerate(bounds)]
        compress(lru, report)
        assert lru.config.state_size == size
    for before, after, bound in zip(whole, systems_of(lru), bounds, strict=True):
        assert gains(before, after).max() <= bound + 1e-4


def test_the_largest_singular_values_matter_most(lru, lru_batches):
    after = {}
    for selection in ("largest", "smallest", "random"):
        report = analyze(lru, lru_batches, CompreSSMConfig(target_state_size=6, selection=selection))
        after[selection] = report.loss_after
        assert all(len(keep) == 6 for keep in report.kept_states.values())
        assert all((keep.diff() > 0).all() for keep in report.kept_states.values())
        if selection == "smallest":
            assert all(keep.tolist() == list(range(10, 16)) for keep in report.kept_states.values())
    assert after["largest"] < min(after["random"], after["smallest"]) - 0.02


def test_a_random_selection_follows_from_the_seed_and_differs_between_layers(lru):
    def keep(seed):
        config = CompreSSMConfig(target_state_size=6, selection="random", calibration_seed=seed)
        return [tuple(keep.tolist()) for keep in analyze(lru, None, config).kept_states.values()]

    assert keep(0) == keep(0)
    assert len({*keep(0), *keep(1)}) == 4


def test_a_layer_asked_for_more_states_than_it_has_in_truth_gets_idle_ones(lru, lru_batches):
    """Repeated eigenvalues and states that nobody sees: 16 states that do the work of eight."""
    mixer = lru.model.layers[0].mixer
    with torch.no_grad():
        for name in ("nu_log", "theta_log", "gamma_log"):
            mixer.get_parameter(name)[:4] = mixer.get_parameter(name)[4:8]
        mixer.B[:4] = 2 * mixer.B[4:8]
        mixer.C[:, 12:] = 0
    logits = lru(input_ids=lru_batches[1]["input_ids"]).logits
    report = analyze(lru, None, CompreSSMConfig(target_state_size=11, skip_layers=[1]))
    compress(lru, report)
    assert mixer.state_size == 11 and all(torch.isfinite(parameter).all() for parameter in mixer.parameters())
    assert ((mixer.C == 0).all((0, 2)) & (mixer.B == 0).all((1, 2))).sum() == 3
    torch.testing.assert_close(lru(input_ids=lru_batches[1]["input_ids"]).logits, logits, rtol=0, atol=1e-5)


def test_a_layer_without_outputs_is_cut_to_the_smallest_size(lru, lru_batches):
    lru.model.layers[0].mixer.C.data.zero_()
    logits = lru(input_ids=lru_batches[1]["input_ids"]).logits
    report = analyze(lru, lru_batches, CompreSSMConfig(loss_budget=1e-4, skip_layers=[1]))
    assert report.state_sizes == {0: 1, 1: N} and math.isfinite(report.score_discarded[0])
    event = compress(lru, report)
    assert math.isfinite(sum(event.score_discarded))
    torch.testing.assert_close(lru(input_ids=lru_batches[1]["input_ids"]).logits, logits, rtol=0, atol=1e-6)


def test_a_model_without_a_head_and_one_in_half_precision_are_reduced_too(blocks):
    base = build_lru().model.eval()
    compress(base, analyze(base, None, CompreSSMConfig(target_state_size=6)))
    half = build_lru().bfloat16()
    compress(half, analyze(half, None, CompreSSMConfig(target_state_size=6)))
    for model, output in ((base, base(input_ids=blocks[:2])[0]), (half, half(input_ids=blocks[:2]).logits)):
        assert list(state_sizes(model).values()) == [6, 6] and torch.isfinite(output).all()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
