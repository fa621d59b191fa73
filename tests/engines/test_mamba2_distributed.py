"""Two processes train and cut a Mamba-2, in either basis, as one would on their joined batch."""

import pytest
import torch
from compared_runs import PROCESSES, launching, running_alone
from conftest import ROOT, STATE_SIZE, assert_identical
from distributed_mamba2 import DEFAULTS, ENGINES
from processes import run_in_processes

from hf_compressm import prepare
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes

SCRIPT = ROOT / "tests" / "engines" / "distributed_mamba2.py"
BOTH = ("axis", "balanced")
IN_CI = (*BOTH, "never axis", "never balanced", "no callback", "sharded")
RESUMED = {  # variant → checkpoints: before the first cut, between the two, and after both
    "ddp": {"axis": (4,), "balanced": (2, 4, 8)},
    "fsdp": {"axis": (2, 4), "balanced": (2, 4, 8), "sharded": (2, 4)},
}
UNEQUAL = ("rollback", "best", "never", "no ")  # those that end otherwise than one that cuts twice
PROJECTIONS = ("B_proj", "C_proj")


def slow_unless_in_ci(engine: str, variant: str):
    return pytest.param(engine, variant, marks=() if variant in IN_CI else pytest.mark.slow)


launched = launching(SCRIPT, ENGINES, lambda engine, variant: variant not in IN_CI)
alone = running_alone(DEFAULTS, without=("ddp_", "fsdp", "save_"))


@pytest.fixture(scope="module")
def resumed(launched):
    """Engine → the folder, where runs have gone on in new processes, all in one launch."""
    done = set()

    def run(engine: str):
        folder = launched(engine)
        if engine not in done:
            done.add(engine)
            names = [f"{variant}@{step}" for variant, steps in RESUMED[engine].items() for step in steps]
            run_in_processes(PROCESSES, SCRIPT, folder, engine, *names)
        return folder

    return run


def read(folder, engine: str, name: str, rank: int) -> list[dict]:
    return torch.load(folder / f"{engine} {name} {rank}.pt")


def size_of(weights: dict) -> int:
    """The number of states of the first layer."""
    mixer = "backbone.layers.0.mixer."
    projection = weights.get(mixer + "B_proj")
    if projection is not None:
        return projection.shape[1]
    return (len(weights[mixer + "conv1d.bias"]) - 64) // 4  # B and C of two groups


@torch.no_grad()
def logits_of(weights: dict, options: dict) -> torch.Tensor:
    """What a model with these weights computes."""
    model = (DEFAULTS | options)["build"]()
    if any(name.endswith(PROJECTIONS) for name in weights):
        prepare(model)
    adopt_checkpoint_sizes(model)
    model.load_state_dict(weights)
    return model.eval()(input_ids=torch.arange(24).view(1, 24)).logits


CUT = [slow_unless_in_ci(engine, v) for engine in ENGINES for v in ENGINES[engine] if not v.startswith(UNEQUAL)]


@pytest.mark.parametrize(("engine", "variant"), CUT)
def test_weights_are_those_of_one_process_after_every_step(launched, alone, engine, variant):
    expected, folder = alone(ENGINES[engine][variant]), launched(engine, variant not in IN_CI)
    first, second = (read(folder, engine, variant, rank) for rank in range(PROCESSES))
    assert [size_of(weights) for weights in first] == [16, 16, 8, 8, 8] + [4] * 8
    for weights, same, reference in zip(first, second, expected, strict=True):
        assert_identical(weights, same)
        assert weights.keys() == reference.keys()
        distances = {name: (weights[name] - reference[name]).abs().max() for name in weights}
        assert max(far for name, far in distances.items() if not name.endswith(PROJECTIONS)) < 1e-6
        for name in weights:
            if name.endswith("B_proj"):  # single rows turn with singular vectors whose σ lie close; WᵀV is what counts
                left, right = (each[name].mT @ each[name.replace("B_proj", "C_proj")] for each in (weights, reference))
                assert (left - right).abs().max() < 2e-5
    left, right = (logits_of(weights[-1], ENGINES[engine][variant]) for weights in (first, expected))
    assert (left - right).abs().max() < 2e-5  # as of WᵀV


@pytest.mark.parametrize("basis", BOTH)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_never_cuts_is_bit_identical_to_one_without_the_callback(launched, engine, basis):
    for rank in range(PROCESSES):
        watched, plain = (read(launched(engine), engine, name, rank) for name in (f"never {basis}", "no callback"))
        assert len(watched) == len(plain) == 13
        for left, right in zip(watched, plain, strict=True):
            whole = torch.eye(STATE_SIZE).expand(2, STATE_SIZE, STATE_SIZE)
            added = left.keys() - right.keys()
            assert len(added) == (4 if basis == "balanced" else 0)
            assert all(name.endswith(PROJECTIONS) and torch.equal(left[name], whole) for name in added)
            assert_identical({name: left[name] for name in right}, right)


@pytest.mark.parametrize(("engine", "variant"), [(engine, v) for engine in ENGINES for v in RESUMED[engine]])
def test_a_run_resumes_exactly_in_new_processes(resumed, engine, variant):
    folder = resumed(engine)
    for rank in range(PROCESSES):
        whole = read(folder, engine, variant, rank)
        for step in RESUMED[engine][variant]:
            weights = read(folder, engine, f"{variant}@{step}", rank)
            assert len(weights) == 13 - step
            for reference, after_step in zip(whole[step:], weights, strict=True):
                assert_identical(reference, after_step)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["axis", "balanced", "disk"])
@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_rollback_the_run_is_that_of_a_model_never_cut(launched, engine, how):
    for rank in range(PROCESSES):
        undone, never_cut = (read(launched(engine, True), engine, n, rank) for n in (f"rollback {how}", "no rollback"))
        assert [size_of(weights) for weights in undone] == [16, 16, 8, 8] + [16] * 9
        for left, right in zip(undone[4:], never_cut[4:], strict=True):
            assert_identical({name: left[name] for name in right}, right)
            assert all(name.endswith(PROJECTIONS) for name in left.keys() - right.keys())


@pytest.mark.slow
@pytest.mark.parametrize("basis", BOTH)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_model_from_before_the_first_cut_is_loaded_at_the_end(launched, engine, basis):
    for rank in range(PROCESSES):
        weights = read(launched(engine, True), engine, f"best {basis}", rank)
        assert [size_of(one) for one in weights] == [16, 16, 8, 8, 8] + [4] * 7 + [16]
        assert_identical(weights[-1], weights[1])
