"""Where singular values are those of the error itself, a plan says which error it will make; elsewhere none."""

from dataclasses import replace

import pytest
import torch
from conftest import build_lru, build_model
from scalar_decay_models import build_bamba, build_mamba2

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.analysis.scalar_decay import ScalarDecayAnalysis
from hf_compressm.report import StateReport
from hf_compressm.storage.history import History, load_history, save_history


def report_of(model, batches, **changes) -> StateReport:
    return analyze(model, batches, CompreSSMConfig(target_state_size=4, **changes))


@pytest.mark.parametrize("build", [build_mamba2, build_bamba])
def test_balanced_states_lose_the_squares_of_the_other_singular_values(build, batches):
    report = report_of(build(), batches, basis="balanced")
    assert report.predicted_error.keys() == report.plan.keys()
    for index, sigma in report.hankel_singular_values.items():
        expected = float(sigma[4:].square().sum() / sigma.square().sum())
        assert report.predicted_error[index] == pytest.approx(expected, rel=1e-9)
        assert report.predicted_error[index] == pytest.approx(report.score_discarded[index], rel=1e-9)


def test_axes_that_are_kept_lose_what_the_gramians_say(batches, monkeypatch):
    seen = {}
    wrapped = ScalarDecayAnalysis.predicted_errors

    def spy(analysis, plan):
        seen.update(analysis.statistics)
        return wrapped(analysis, plan)

    monkeypatch.setattr(ScalarDecayAnalysis, "predicted_errors", spy)
    report = report_of(build_mamba2(), batches, basis="axis", criterion="magnitude")
    balanced = report_of(build_mamba2(), batches, basis="balanced")
    for index, statistics in seen.items():
        lost, whole = 0.0, 0.0
        for P, Q, kept in zip(*statistics.gramians, report.kept_states[index], strict=True):
            dropped = [n for n in range(16) if n not in kept.tolist()]
            lost += float((Q[dropped][:, dropped] * P[dropped][:, dropped]).sum())
            whole += float((Q * P).sum())
        assert report.predicted_error[index] == pytest.approx(lost / whole, rel=1e-6)
        assert report.predicted_error[index] > balanced.predicted_error[index]


def test_the_table_and_the_record_tell_it(batches, tmp_path):
    model = build_mamba2()
    report = report_of(model, batches, basis="balanced")
    printed = str(report)
    assert "output error predicted" in printed
    assert all(f"{error:.2%}" in printed for error in report.predicted_error.values())
    assert "output error predicted" not in str(replace(report, predicted_error={}))
    event = compress(model, report)
    save_history(History({}, events=[event]), tmp_path)
    assert load_history(tmp_path).events[0].by_layer("predicted_error") == report.predicted_error


def test_singular_values_that_predict_no_error_say_none(batches, lru_batches):
    for model, data in ((build_model(), batches), (build_lru(), lru_batches)):
        report = report_of(model, data)
        assert report.predicted_error == {} and "predicted" not in str(report)
        assert compress(model, report).predicted_error is None


def test_a_layer_that_loses_nothing_is_predicted_no_error(batches):
    report = analyze(build_mamba2(), batches, CompreSSMConfig(target_state_size=16, basis="balanced"))
    assert not report.is_cut and set(report.predicted_error.values()) == {0.0}
    assert torch.stack(list(report.hankel_singular_values.values())).gt(0).all()
