"""A cut of a Mamba-2 happens as a whole or not at all, whatever line of it an exception comes from."""

import pytest
from interruptions import (
    BATCH,
    SIZES,
    assert_cut_under_an_engine,
    assert_cut_with_a_companion,
    counted,
    sharded,
    some_while_things_change,
    thorough,
)
from scalar_decay_models import build_mamba2

from hf_compressm import CompreSSMConfig, analyze, prepare


def tiny():
    return build_mamba2(**SIZES, num_hidden_layers=2, num_heads=2, head_dim=8, n_groups=1)


def tiny_prepared():
    model = tiny()
    prepare(model)
    return model


def report_of(make, basis: str):
    return analyze(make(), [BATCH] * 2, CompreSSMConfig(calibration_batches=2, target_state_size=2, basis=basis))


CASES = {"axis": (tiny, "axis"), "prepared": (tiny_prepared, "balanced"), "not prepared": (tiny, "balanced")}


def some_and_the_end(lines: list) -> list[int]:
    """A few lines while things change, and the last that could still undo them."""
    last = max(number for number, (_, _, function) in enumerate(lines) if function == "__exit__")
    return sorted({*some_while_things_change(lines), last})


@thorough(some_and_the_end)
@pytest.mark.parametrize("case", CASES)
def test_a_cut_with_a_companion(case, choose):
    make, basis = CASES[case]
    assert_cut_with_a_companion(make, report_of(make, basis), choose)


@thorough(some_while_things_change)
@pytest.mark.parametrize(("case", "wrap"), [("not prepared", counted), ("axis", sharded), ("prepared", sharded)])
def test_a_cut_under_an_engine(case, wrap, choose):
    make, basis = CASES[case]
    assert_cut_under_an_engine(make, report_of(make, basis), wrap, choose)
