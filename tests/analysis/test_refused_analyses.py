"""What an analysis cannot work on, or a cut cannot do, is refused: the error names the value and the remedy."""

import pytest
import torch
from conftest import assert_identical, build_lru, build_model, build_trainer, weights_of
from trainer_callbacks import cutting_callback

from hf_compressm import CompreSSMConfig, analyze, compress

TARGET = CompreSSMConfig(target_state_size=4)


def test_a_target_above_the_state_size_is_refused(tmp_path, dataset, batches):
    config = CompreSSMConfig(target_state_size=32)
    with pytest.raises(ValueError, match=r"target_state_size = 32 is above the model's 16 states; give 1 … 16"):
        analyze(build_model(), batches, config)
    with pytest.raises(ValueError, match="target_state_size = 32"):
        build_trainer(tmp_path, dataset, [cutting_callback(target_state_size=32)]).train()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "ended after 0 batches, 2 are needed"),
        ([{"input_ids": torch.ones(2, 8, dtype=torch.long)}], "ended after 1 batches"),
        ([{"pixel_values": torch.ones(2, 8)}] * 8, "it needs input_ids"),
        ([dict.fromkeys(("input_ids", "labels"), torch.ones(2, 1, dtype=torch.long))] * 8, "no token to predict"),
        (
            [{"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.full((2, 8), -100)}] * 8,
            "no token to predict",
        ),
    ],
)
def test_calibration_data_that_is_missing_or_unusable_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        analyze(build_model(), batches, TARGET)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(batches, value):
    model = build_model()
    model.backbone.layers[1].mixer.A_log.data[3, 2] = value
    with pytest.raises(ValueError, match="layer 1 A_log holds NaN or Inf"):
        analyze(model, batches, TARGET)


def test_statistics_and_losses_that_are_not_finite_are_refused(batches):
    model = build_model()
    model.backbone.layers[0].mixer.in_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 0: the state scores are not finite"):
        analyze(model, batches, TARGET)
    model = build_model()
    model.backbone.norm_f.weight.data.fill_(float("inf"))
    before = weights_of(model)
    with pytest.raises(ValueError, match="the loss on the calibration batches is NaN or Inf"):
        analyze(model, batches, TARGET)
    assert_identical(weights_of(model), before)


def test_a_report_is_applied_once_and_to_its_own_sizes(batches):
    model = build_model()
    report, second = analyze(model, batches, TARGET), analyze(model, batches, CompreSSMConfig(target_state_size=8))
    compress(model, report)
    with pytest.raises(ValueError, match="has been applied already"):
        compress(model, report)
    with pytest.raises(ValueError, match="made for state sizes"):
        compress(model, second)
    assert model.config.state_size == 4


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"tolerance": 0.1, "criterion": "output"}, "criterion = 'output'; the states of model type 'lru'"),
        ({"target_state_size": 17}, "target_state_size = 17 is above the model's 16 states"),
        ({"tolerance": 0.1, "skip_layers": [2]}, r"skip_layers = \[2\]; allowed: some of the layers \[0, 1\]"),
        ({"tolerance": 0.1, "skip_layers": [-1]}, r"skip_layers = \[-1\]"),
        ({"tolerance": 0.1, "skip_layers": [0, 1]}, r"skip_layers = \[0, 1\]"),
        ({"loss_budget": 0.1}, "loss_budget = 0.1 needs the loss .*, and batches = None"),
    ],
)
def test_a_configuration_that_does_not_fit_an_lru_is_refused(goal, message):
    with pytest.raises(ValueError, match=message):
        analyze(build_lru(), None, CompreSSMConfig(**goal))


@pytest.mark.parametrize(
    ("goal", "given", "message"),
    [
        ({"tolerance": 0.1}, False, "batches = None; a model of type 'mamba' is analysed on batches"),
        ({"tolerance": 0.1, "skip_layers": [0]}, True, r"skip_layers = \[0\]; allowed: .* a size of its own"),
    ],
)
def test_what_only_an_lru_can_do_is_refused_for_a_mamba(batches, goal, given, message):
    with pytest.raises(ValueError, match=message):
        analyze(build_model(), batches if given else None, CompreSSMConfig(**goal))


def test_weights_that_diverged_and_reports_of_another_model_are_refused(lru, lru_batches):
    report = analyze(lru, None, CompreSSMConfig(target_state_size=6))
    with pytest.raises(ValueError, match=r"made for state sizes .* the model has \{0: 5, 1: 9\}"):
        compress(build_lru(state_size=[5, 9]), report)
    compress(lru, report)
    with pytest.raises(ValueError, match="applied already"):
        compress(lru, report)
    with pytest.raises(ValueError, match="loss_budget = 0.1 needs .*, and the calibration batches have no labels"):
        analyze(lru, [{"input_ids": batch["input_ids"]} for batch in lru_batches], CompreSSMConfig(loss_budget=0.1))
    with pytest.raises(ValueError, match=r"layer 0 nu_log is trained in torch\.bfloat16"):
        half = build_lru().bfloat16()
        report = analyze(half, None, CompreSSMConfig(target_state_size=6))
        compress(half, report, torch.optim.SGD(half.parameters()))
    lru.model.layers[1].mixer.theta_log.data[3] = float("nan")
    with pytest.raises(ValueError, match="layer 1 theta_log holds NaN or Inf"):
        analyze(lru, None, CompreSSMConfig(tolerance=0.1))
