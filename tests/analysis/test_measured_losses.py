"""The losses that an analysis of an LRU reports are those of the model, whole and cut."""

import copy

import pytest
import torch
from conftest import build_lru

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.analysis.losses import LossMeter
from hf_compressm.analysis.objective import Objective
from hf_compressm.analysis.time_invariant import TimeInvariantAnalysis
from hf_compressm.architectures import state_layers

N = 16


def mean_loss(model, batches) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() * len(batch["labels"]) for batch in batches]
    return sum(losses) / sum(len(batch["labels"]) for batch in batches)


@pytest.mark.parametrize("selection", ["largest", "random"])
def test_the_measured_losses_are_those_of_the_compressed_model(lru, lru_batches, selection):
    config = CompreSSMConfig(target_state_size=3, selection=selection)
    report = analyze(lru, lru_batches, config)
    assert report.loss_before == pytest.approx(mean_loss(lru, lru_batches[:4]), abs=1e-6)
    assert "measured loss" in str(report)
    for kept, cut in ((0, 1), (1, 0)):
        alone = copy.deepcopy(lru)
        compress(alone, analyze(alone, None, CompreSSMConfig(**vars(config) | {"skip_layers": [kept]})))
        sequences = [{name: value[::2] for name, value in lru_batches[0].items()}]  # for two layers
        change = mean_loss(alone, sequences) - mean_loss(lru, sequences)
        assert report.single_layer_loss_change[cut] == pytest.approx(change, abs=1e-5)

    event = compress(lru, report)
    assert report.loss_after == pytest.approx(mean_loss(lru, lru_batches[:4]), abs=1e-5)
    assert abs(report.loss_after - report.loss_before) > 1e-4
    assert (event.loss_before, event.loss_after, event.criterion) == (report.loss_before, report.loss_after, "hankel")


def test_losses_of_a_number_are_weighted_by_the_size_of_their_batches(lru_batches):
    model = build_lru(num_labels=1).eval()
    for shape in ((-1,), (-1, 1)):
        batches = [batch | {"labels": batch["labels"].float().view(shape)} for batch in lru_batches]
        report = analyze(model, batches, CompreSSMConfig(target_state_size=3))
        assert report.loss_before == pytest.approx(mean_loss(model, batches[:4]), abs=1e-6)


def test_plans_with_the_same_largest_size_are_measured_each(lru, lru_batches):
    analysis = TimeInvariantAnalysis(state_layers(lru), CompreSSMConfig(tolerance=0.1))
    plans = [analysis.plan({0: first, 1: second}) for first, second in ((N, 3), (3, N), (3, 3), (N, N))]
    with torch.no_grad():
        meter = LossMeter(state_layers(lru), lru_batches[:2], Objective(lru))
        losses = [meter.loss(plan) for plan in plans]
        assert losses == [LossMeter(state_layers(lru), lru_batches[:2], Objective(lru)).loss(plan) for plan in plans]
    assert len(set(losses)) == 4 and losses[3] == pytest.approx(mean_loss(lru, lru_batches[:2]), abs=1e-6)


def test_labels_may_stand_in_a_column(lru, lru_batches):
    columns = [batch | {"labels": batch["labels"].unsqueeze(1)} for batch in lru_batches]
    losses = [analyze(lru, batches, CompreSSMConfig(tolerance=0.1)).loss_after for batches in (lru_batches, columns)]
    assert losses[0] == losses[1]


def test_a_model_without_a_head_has_no_loss_that_could_decide(lru_batches):
    assert analyze(build_lru().model, lru_batches, CompreSSMConfig(tolerance=0.1)).loss_before is None
    with pytest.raises(ValueError, match="LRUModel computes none"):
        analyze(build_lru().model, lru_batches, CompreSSMConfig(loss_budget=0.1))
