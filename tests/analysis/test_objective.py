"""What a loss decides is decided by the loss that is trained, or not at all."""

import pytest
import torch
from conftest import build_model
from delay_task import delayed_batches, delayed_loss, true_loss

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.analysis.losses import mean_loss
from hf_compressm.analysis.objective import Objective

BUDGET = CompreSSMConfig(loss_budget=0.02)


def test_a_loss_budget_is_held_by_the_loss_that_is_trained(delay_model):
    before = true_loss(delay_model)
    report = analyze(delay_model, delayed_batches(4), BUDGET, loss=delayed_loss)
    assert report.loss_before == pytest.approx(before, abs=0.01)
    event = compress(delay_model, report)
    assert true_loss(delay_model) - before < 0.03 and event.loss_after - event.loss_before <= 0.02
    assert 1 < event.state_sizes_after[0] < 16  # states go, and what they remember stays


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_budget": 0.02}, "loss_budget = 0.02"),
        ({"target_state_size": 4, "allocation": "global"}, "allocation = 'global'"),
        ({"target_state_size": 4, "refit": True}, "refit = True"),
        ({"target_state_size": 4, "criterion": "taylor"}, "criterion = 'taylor'"),
    ],
)
def test_what_a_loss_decides_is_refused_without_the_loss_that_is_trained(delay_model, options, named):
    with pytest.raises(ValueError, match=f"{named} needs .*, and the calibration batches have no labels: give"):
        analyze(delay_model, delayed_batches(4), CompreSSMConfig(**options))


def test_what_a_loss_only_reports_is_left_out(delay_model):
    report = analyze(delay_model, delayed_batches(4), CompreSSMConfig(target_state_size=4))
    assert report.loss_before is report.loss_after is None and report.single_layer_loss_change == {}
    assert "loss" not in str(report)
    with_loss = analyze(delay_model, delayed_batches(4), CompreSSMConfig(target_state_size=4), loss=delayed_loss)
    assert torch.equal(with_loss.kept_states[0], report.kept_states[0]) and with_loss.loss_after is not None


def test_labels_that_are_shifted_already_are_not_shifted_again(batches):
    shifted = [{"input_ids": batch["input_ids"][:, :-1], "labels": batch["input_ids"][:, 1:]} for batch in batches]
    assert analyze(build_model(), shifted, CompreSSMConfig(target_state_size=4)).loss_before is None
    with pytest.raises(ValueError, match="the labels are the next tokens already"):
        analyze(build_model(), shifted, BUDGET)


def test_a_loss_of_ones_own_gives_what_the_models_own_gives(batches):
    """With refit, taylor and a global allocation, in all digits: the same forward passes, the same numbers."""

    def own(model, batch):
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss, batch["labels"][:, 1:].numel()

    config = CompreSSMConfig(loss_budget=0.05, allocation="global", criterion="taylor", refit=True)
    reports = [analyze(build_model(), batches, config, loss=loss) for loss in (None, own)]
    assert reports[0].loss_after == reports[1].loss_after and reports[0].state_sizes == reports[1].state_sizes
    for index, scores in reports[0].scores.items():
        assert torch.equal(scores, reports[1].scores[index])


def test_the_mean_is_over_the_terms_that_the_loss_counts(delay_model):
    def loss(model, batch):
        return model(input_ids=batch["input_ids"]).logits.mean() * 0 + batch["value"].mean(), int(batch["count"])

    batches = [
        {"input_ids": torch.zeros(1, 8, dtype=torch.long), "value": torch.tensor(v), "count": torch.tensor(n)}
        for v, n in ((1.0, 1), (4.0, 3))
    ]
    with torch.no_grad():
        assert mean_loss(Objective(delay_model, loss), batches, {}) == pytest.approx((1 + 4 * 3) / 4)


@pytest.mark.parametrize("form", ["tuple", "dict", "return_dict"])
def test_outputs_of_any_form_are_read(batches, form):
    """`return_dict=False`, or a forward that returns a tuple or a dict."""
    expected = analyze(build_model(), batches, CompreSSMConfig(loss_budget=0.05, recall_pairs=4))
    model = build_model()
    if form == "return_dict":
        model.config.return_dict = False
    else:
        model.__class__ = {"tuple": TupleMamba, "dict": DictMamba}[form]
    report = analyze(model, batches, CompreSSMConfig(loss_budget=0.05, recall_pairs=4))
    assert report.loss_after == expected.loss_after and report.state_sizes == expected.state_sizes
    assert report.recall_after == expected.recall_after


class TupleMamba(type(build_model())):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        return outputs.loss, outputs.logits


class DictMamba(TupleMamba):
    def forward(self, input_ids=None, **kwargs):
        return dict(zip(("loss", "logits"), super().forward(input_ids, **kwargs), strict=True))


def test_a_loss_that_is_no_scalar_is_refused(delay_model):
    with pytest.raises(ValueError, match=r"is of shape \(16,\); allowed: a tensor with one element"):
        analyze(delay_model, delayed_batches(4), BUDGET, loss=lambda model, batch: (torch.zeros(16), 16))
