"""The monitor reads spectra, says how far they moved and by Weyl's bound could move, and disturbs nothing."""

import pytest
import scipy.linalg
import torch
from conftest import assert_identical, build_model, build_trainer, random_state, systems_of, weights_of
from transformers import set_seed

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze
from hf_compressm.architectures import state_layers
from hf_compressm.theory.hankel import gramians
from hf_compressm.training.monitor import StateMonitor

N = 16


def test_the_bound_on_the_movement_is_the_norm_of_the_change_of_the_hankel_operator(lru):
    def operator(system):
        P, Q = (gramian.numpy() for gramian in gramians(torch.diag(system[0]), *system[1:]))
        root = scipy.linalg.sqrtm(P)
        return scipy.linalg.sqrtm(root @ Q @ root)

    lru.model.layers[0].mixer.C.data[:, 10:] *= 100
    monitor, config = StateMonitor(), CompreSSMConfig(tolerance=0.1)
    monitor.observe(state_layers(lru), None, config, 1)
    before = systems_of(lru)
    set_seed(0)
    for parameter in lru.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    observation = monitor.observe(state_layers(lru), None, config, 2)
    for bound, then, now in zip(observation.weyl_bound, before, systems_of(lru), strict=True):
        assert bound == pytest.approx(scipy.linalg.norm(operator(now) - operator(then), 2), rel=1e-4)
    assert monitor.observe(state_layers(lru), None, config, 3).movement == [0.0, 0.0]


def test_a_mamba_is_observed_on_data_without_being_disturbed(batches):
    model, config, monitor = build_model().train(), CompreSSMConfig(tolerance=0.1), StateMonitor()
    before, random = weights_of(model), random_state()
    first = monitor.observe(state_layers(model), batches, config, 1)
    assert model.training and random_state() == random
    assert_identical(weights_of(model), before)
    expected = analyze(model, batches, config).hankel_singular_values
    for spectrum, reported in zip(first.hankel_singular_values, expected.values(), strict=True):
        assert torch.equal(spectrum, reported) and not spectrum.requires_grad
    second = monitor.observe(state_layers(model), batches[2:] + batches[:2], config, 2)
    assert min(second.movement) > 0 and (first.movement, first.weyl_bound, second.weyl_bound) == (None, None, None)


def test_a_mamba_that_does_not_learn_does_not_seem_to_move(tmp_path, dataset):
    callback = CompreSSMCallback(CompreSSMConfig(tolerance=1e-9), CompreSSMSchedule(events=1, monitor_steps=5))
    build_trainer(tmp_path, dataset, [callback], learning_rate=0.0).train()
    assert [seen.step for seen in callback.history.observations] == [5, 10, 15, 20]
    assert [seen.movement for seen in callback.history.observations[1:]] == [[0.0, 0.0]] * 3
