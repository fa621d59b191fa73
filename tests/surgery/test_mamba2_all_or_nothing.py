"""A cut of a Mamba-2 happens as a whole or not at all, whatever line of it an exception comes from."""

from dataclasses import replace

import pytest
import torch
from scalar_decay_models import build_mamba2
from test_all_or_nothing import (
    assert_all_or_nothing,
    batch,  # noqa: F401, a fixture
    build,
    counted,
    cut,
    one_process,  # noqa: F401, a fixture
    sharded,
    some_while_things_change,
    thorough,
)

from hf_compressm import CompreSSMConfig, analyze, prepare
from hf_compressm.architectures import state_layers

SIZES = {"hidden_size": 8, "state_size": 4, "vocab_size": 16, "num_heads": 2, "head_dim": 8, "n_groups": 1}


def tiny():
    return build_mamba2(**SIZES, num_hidden_layers=2)


def tiny_prepared():
    model = tiny()
    prepare(model)
    return model


def report_of(make, batch, basis: str):  # noqa: F811
    config = CompreSSMConfig(calibration_batches=2, target_state_size=2, basis=basis)
    return analyze(make(), [batch] * 2, config)


CASES = {"axis": (tiny, "axis"), "prepared": (tiny_prepared, "balanced"), "not prepared": (tiny, "balanced")}


def some_and_the_end(lines: list) -> list[int]:
    """A few lines while things change, and the last that could still undo them."""
    last = max(number for number, (_, _, function) in enumerate(lines) if function == "__exit__")
    return sorted({*some_while_things_change(lines), last})


@thorough(some_and_the_end)
@pytest.mark.parametrize("case", CASES)
def test_a_cut_with_a_companion(case, choose, batch):  # noqa: F811
    make, basis = CASES[case]
    report = report_of(make, batch, basis)

    def start():
        run = build(make, batch)
        run.report, run.companions = replace(report), (make(),)
        return run

    def check(run):
        assert state_layers(run.companions[0]).sizes == state_layers(run.model).sizes
        assert type(run.companions[0]) is type(run.model)
        run.optimizer.step()
        assert torch.isfinite(run.model(**batch).loss)

    assert_all_or_nothing(start, cut, choose, check)


@thorough(some_while_things_change)
@pytest.mark.parametrize(("case", "wrap"), [("not prepared", counted), ("axis", sharded), ("prepared", sharded)])
def test_a_cut_under_an_engine(case, wrap, choose, batch, one_process):  # noqa: F811
    make, basis = CASES[case]
    report = report_of(make, batch, basis)

    def start():
        run = build(make, batch, wrap)
        run.report = replace(report)
        return run

    def check(run):
        run.optimizer.zero_grad()
        if wrap is counted:
            run.wrapped.entries.clear()
        run.wrapped(**batch).loss.backward()
        unused = set(getattr(run.model, "_ddp_params_and_buffers_to_ignore", ()))
        used = [parameter for name, parameter in run.model.named_parameters() if name not in unused]
        assert all(parameter.grad.shape == parameter.shape for parameter in used)
        if wrap is counted:
            assert sum(run.wrapped.entries) == sum(parameter.numel() for parameter in used)
        run.optimizer.step()

    assert_all_or_nothing(start, cut, choose, check)
