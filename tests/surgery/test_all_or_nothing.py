"""A change of sizes happens as a whole or not at all, whatever line of it an exception comes from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import build_lru, build_model
from interruptions import (
    BATCH,
    SIZES,
    assert_all_or_nothing,
    assert_cut_under_an_engine,
    assert_cut_with_a_companion,
    build,
    counted,
    cut,
    sharded,
    some,
    some_while_things_change,
    thorough,
    while_things_change,
)

from hf_compressm import CompreSSMConfig, analyze
from hf_compressm.surgery.adopt_sizes import _adopt_sizes
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state, set_state_sizes


def tiny():
    return build_model(**SIZES)


@thorough(while_things_change)
def test_a_cut_that_changes_the_class_and_a_companion(choose):
    config = CompreSSMConfig(calibration_batches=2, cut_fraction=0.5, skip_layers=[1], allocation="per_layer")
    assert_cut_with_a_companion(tiny, analyze(tiny(), [BATCH] * 2, config), choose)


@thorough(some)
def test_a_truncation(choose):
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "labels": torch.tensor([0, 1])}

    def make():
        return build_lru(state_size=4, hidden_size=3, vocab_size=16)

    report = analyze(make(), None, CompreSSMConfig(target_state_size=2))

    def start():
        run = build(make, batch)
        run.report = replace(report)
        return run

    assert_all_or_nothing(start, cut, choose)


CHANGES = {
    "pad_state": lambda run: pad_state(run.model, 6),
    "grow_state": lambda run: grow_state(run.model, 6, run.optimizer, torch.Generator().manual_seed(0)),
    "set_state_sizes": lambda run: set_state_sizes(run.model, {0: 3, 1: 2}, run.optimizer),
    "_adopt_sizes": lambda run: _adopt_sizes(run.optimizer, run.model, run.smaller, ""),
}


@thorough(some)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_size(change, choose):
    smaller = tiny()
    set_state_sizes(smaller, {0: 3, 1: 3})

    def start():
        run = build(tiny)
        run.smaller = smaller.state_dict()
        if change == "pad_state":  # it knows no optimizer
            run.optimizer = SimpleNamespace(param_groups=[], state={})
        return run

    assert_all_or_nothing(start, CHANGES[change], choose)


@thorough(some_while_things_change)
@pytest.mark.parametrize("wrap", [counted, sharded])
def test_a_cut_under_an_engine(wrap, choose):
    report = analyze(tiny(), [BATCH] * 2, CompreSSMConfig(calibration_batches=2, target_state_size=2))
    assert_cut_under_an_engine(tiny, report, wrap, choose)
