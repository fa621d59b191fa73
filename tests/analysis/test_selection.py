"""What a configuration asks for is what the plan keeps: ranks, gates, staged goals, and the loss budget's word."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import assert_identical, build_model, weights_of
from torch.utils.data import DataLoader

from hf_compressm import CompreSSMConfig, CompreSSMSchedule, analyze, compress
from hf_compressm.analysis.objective import Objective
from hf_compressm.theory.criteria import CRITERIA, LayerStates
from hf_compressm.theory.hankel import truncation_rank


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_strongest_states_are_kept_by_every_criterion(trained, batches, criterion):
    model, _ = trained
    report = analyze(model, batches, CompreSSMConfig(target_state_size=5, criterion=criterion))
    for index, score in report.scores.items():
        assert torch.equal(report.kept_states[index], score.topk(5).indices.sort().values)
        assert report.score_discarded[index] == pytest.approx(float(score.sort().values[:11].sum() / score.sum()))


def norms(layer: LayerStates) -> torch.Tensor:
    return layer.B_rows.norm(dim=1) * layer.C_rows.norm(dim=1)


def test_a_criterion_of_ones_own_ranks_and_is_recorded_by_its_name(trained, batches):
    config = CompreSSMConfig(target_state_size=5, criterion=norms)
    report = analyze(trained[0], batches, config)
    reference = analyze(trained[0], batches, CompreSSMConfig(target_state_size=5, criterion="magnitude"))
    assert {i: keep.tolist() for i, keep in report.kept_states.items()} == {
        i: k.tolist() for i, k in reference.kept_states.items()
    }
    assert report.criterion == "norms" and compress(trained[0], report).criterion == "norms"
    assert config.to_dict()["criterion"] == "norms" and json.dumps(config.to_dict())
    assert CompreSSMConfig.from_dict(reference.config.to_dict()) == reference.config
    with pytest.raises(ValueError, match="criterion = 'norms' is a function of your own, and only its name was kept"):
        CompreSSMConfig.from_dict(config.to_dict())


@pytest.mark.parametrize(
    "scores",
    [
        None,
        [1.0] * 16,
        torch.ones(15),
        torch.ones(16, 1),
        -torch.ones(16),
        torch.full((16,), torch.nan),
        torch.ones(1),
    ],
)
def test_scores_of_ones_own_that_are_none_are_refused_by_name(trained, batches, scores):
    def mine(layer):
        return scores

    with pytest.raises(ValueError, match=r"(?s)criterion mine gave .*; allowed: a tensor of 16 scores, one for each"):
        analyze(trained[0], batches, CompreSSMConfig(target_state_size=5, criterion=mine))


def test_a_name_that_is_taken_is_refused():
    def output(layer):
        return layer.statistics.output_energy

    with pytest.raises(
        ValueError, match="criterion = <function .*output.*; allowed: a name that is not one of output"
    ):
        CompreSSMConfig(tolerance=0.1, criterion=output)
    assert CompreSSMConfig(tolerance=0.1, criterion=CRITERIA["output"]).to_dict()["criterion"] == "output"


def test_taylor_is_how_fast_the_loss_changes_as_a_state_fades(learned, batches):
    """Whatever the batches: data in unequal parts, and padded, make one gradient."""
    model = build_model()
    model.load_state_dict(learned)
    model.double()
    padded = [{**batch, "labels": batch["labels"].clone()} for batch in batches[:4]]
    padded[2]["labels"][1:, 5:] = -100
    report = analyze(model, padded, CompreSSMConfig(target_state_size=5, criterion="taylor"))
    joined = {name: torch.cat([padded[0][name], padded[2][name]]) for name in padded[0]}
    rows, step = model.backbone.layers[1].mixer.x_proj.weight.detach(), 0.05  # Transformers' losses are float32
    for n in (0, 7, 15):
        losses = []
        for scale in (1 + step, 1 - step):
            changed = rows.clone()
            changed[[2 + n, 2 + 16 + n]] *= scale
            overrides = {"backbone.layers.1.mixer.x_proj.weight": changed}
            with torch.no_grad():
                losses.append(Objective(model.eval()).loss(joined, overrides)[0].item())
        slope = abs(losses[0] - losses[1]) / (2 * step)
        assert report.scores[1][n].item() == pytest.approx(slope, rel=0.02)


def test_a_tolerance_keeps_the_largest_rank_that_any_layer_asks_for(trained, batches):
    model, _ = trained
    report = analyze(model, batches, CompreSSMConfig(tolerance=0.3))
    ranks = [truncation_rank(score.sort(descending=True).values, 0.3) for score in report.scores.values()]
    assert set(report.state_sizes.values()) == {max(ranks)}
    assert max(ranks) < 16
    assert all(0 < share <= 0.3 for share in report.score_discarded.values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cut_fraction": 0.25}, 12),
        ({"cut_fraction": 0.3, "multiple_of": 4}, 12),
        ({"cut_fraction": 0.9, "min_state_size": 7}, 7),
        ({"cut_fraction": 0.9, "min_state_size": 7, "multiple_of": 4}, 8),
        ({"cut_fraction": 0.1, "multiple_of": 16}, 16),
        ({"cut_fraction": 0.05}, 16),  # of 16 states less than one
        ({"cut_fraction": 0.07}, 15),
        ({"target_state_size": 15}, 15),  # the gate does not stand in the way of an explicit size
        ({"tolerance": 1e-6}, 16),
    ],
)
def test_sizes_are_rounded_up_and_gated(trained, batches, options, expected):
    report = analyze(trained[0], batches, CompreSSMConfig(**options))
    assert set(report.state_sizes.values()) == {expected}
    assert report.is_cut == (expected < 16)
    if not report.is_cut:
        assert report.loss_after == report.loss_before


def loss_of(model, batches) -> float:
    """On the half of the calibration batches that is held out for losses."""
    model.eval()
    with torch.no_grad():
        return sum(Objective(model).loss(batch, {})[0].item() for batch in batches[1:4:2]) / 2


@pytest.mark.parametrize("multiple_of", [1, 3])
@pytest.mark.parametrize("budget", [0.0005, 0.002, 0.006])
def test_a_loss_budget_is_kept_and_one_step_fewer_would_break_it(learned, batches, budget, multiple_of):
    model = build_model()
    model.load_state_dict(learned)
    before = loss_of(model, batches)
    report = analyze(model, batches, CompreSSMConfig(loss_budget=budget, multiple_of=multiple_of, min_reduction=0))
    chosen = max(report.state_sizes.values())
    compress(model, report)
    assert loss_of(model, batches) - before <= budget + 1e-6

    smaller = chosen - multiple_of if chosen < 16 or 16 % multiple_of == 0 else 16 - 16 % multiple_of
    if smaller >= 1:
        model = build_model()
        model.load_state_dict(learned)
        compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=smaller)))
        assert loss_of(model, batches) - before > budget - 1e-6


def test_compensation_makes_up_for_part_of_what_is_dropped(learned, batches):
    model = build_model()
    model.load_state_dict(learned)
    rises = {True: 0.0, False: 0.0}
    for compensate in rises:
        for size in (1, 2, 4, 8):
            config = CompreSSMConfig(target_state_size=size, criterion="random", compensate=compensate)
            report = analyze(model, batches, config)
            rises[compensate] += report.loss_after - report.loss_before
    assert 0 < rises[True] < rises[False]


def test_a_generous_budget_stops_at_the_floor(learned, batches):
    model = build_model()
    model.load_state_dict(learned)
    report = analyze(model, batches, CompreSSMConfig(loss_budget=100.0, min_state_size=3, multiple_of=2))
    assert set(report.state_sizes.values()) == {4}


def test_over_several_cuts_the_total_counts(learned, batches):
    model = build_model()
    model.load_state_dict(learned)
    config, spent, sizes = CompreSSMConfig(loss_budget=0.003, min_reduction=0), 0.0, [16]
    for events_left in (3, 2, 1):
        report = analyze(model, batches, config.for_event(sizes[-1], events_left, spent))
        event = compress(model, report)
        spent += max(0.0, event.loss_after - event.loss_before)
        sizes.append(model.config.state_size)
    assert 0 < spent <= 0.003
    assert sizes[-1] <= sizes[1] < 16
    report = analyze(model, batches, config.for_event(sizes[-1], 1, loss_spent=0.003))
    assert report.loss_after <= report.loss_before + 1e-9


def test_a_target_is_approached_by_equal_factors():
    config, sizes = CompreSSMConfig(target_state_size=4), [64]
    for events_left in (4, 3, 2, 1):
        sizes.append(config.for_event(sizes[-1], events_left, 0.0).target_state_size)
    assert sizes == [64, 32, 16, 8, 4]
    assert CompreSSMConfig(target_state_size=16, multiple_of=8).for_event(64, 4, 0.0).target_state_size == 48
    # A step that rounds to more than there is goes all the way.
    assert CompreSSMConfig(target_state_size=8, multiple_of=8).for_event(12, 2, 0.0).target_state_size == 8


def test_events_are_equidistant_and_end_with_the_window():
    assert CompreSSMSchedule().event_steps(1000) == [25, 50, 75, 100]
    assert CompreSSMSchedule(start=0.2, end=0.5, events=3).event_steps(100) == [30, 40, 50]
    assert CompreSSMSchedule(end=1.0, events=1).event_steps(7) == [7]


@pytest.mark.parametrize("criterion", ["output", "mean", "taylor"])
def test_analysis_changes_nothing(trained, batches, criterion):
    model, _ = trained
    model.train()
    model.backbone.layers[0].eval()  # a mixed mode is restored as it was
    modes, modes_seen = [module.training for module in model.modules()], []
    model.backbone.register_forward_hook(lambda module, *_: modes_seen.append(module.training))
    before, random_state = weights_of(model), torch.get_rng_state()
    parameters = list(model.parameters())
    analyze(model, batches, CompreSSMConfig(loss_budget=0.01, criterion=criterion))
    assert_identical(weights_of(model), before)
    assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes_seen and not any(modes_seen)  # in training mode a GPU's fused path would show nothing
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_data_loader_gives_batches_and_no_random_state_is_touched(trained, dataset, batches):
    model, _ = trained
    loader = DataLoader(dataset.with_format("torch"), batch_size=8)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    report = analyze(model, loader, CompreSSMConfig(target_state_size=4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all() and random.getstate() == python_state
    reference = analyze(model, batches, CompreSSMConfig(target_state_size=4))
    assert report.loss_after == reference.loss_after


def test_analysis_does_not_depend_on_what_else_is_drawn(trained, batches):
    model, _ = trained
    config = CompreSSMConfig(target_state_size=4, criterion="random", calibration_seed=7)
    first = analyze(model, batches, config)
    torch.rand(3)
    second = analyze(model, batches, config)
    assert {i: k.tolist() for i, k in first.kept_states.items()} == {
        i: k.tolist() for i, k in second.kept_states.items()
    }
    assert first.loss_after == second.loss_after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_model_in_half_precision_is_analysed_in_float32_and_cast_back(learned, batches, dtype):
    model = build_model()
    model.load_state_dict(learned)
    model = model.to(dtype)
    exact = build_model()
    exact.load_state_dict(model.state_dict())
    config = CompreSSMConfig(target_state_size=6)
    report, reference = analyze(model, batches, config), analyze(exact, batches, config)
    assert report.loss_after == pytest.approx(reference.loss_after, abs=1e-5)
    compress(model, report)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.state_size == 6
    assert model(input_ids=batches[0]["input_ids"]).logits.isfinite().all()


def test_the_report_is_a_table_that_names_every_layer(trained, batches):
    text = str(analyze(trained[0], batches, CompreSSMConfig(target_state_size=5)))
    header, first, second, measured = text.splitlines()
    assert header.split("  ") == ["layer", "N before", "N after", "score discarded", "single-layer loss change"]
    assert first.split()[:3] == ["0", "16", "5"] and second.split()[:3] == ["1", "16", "5"]
    assert "%" in first and "nats" in first
    assert measured.startswith("measured loss: ")
