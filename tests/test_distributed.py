"""Two processes train what one would on their joined batch: through the cuts, and bit-identically to each other.

And what goes wrong in one of them stops all of them, with one clear error.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_identical, build_model, weights_of
from distributed_loop import batches_of, train_and_cut
from distributed_training import VARIANTS, train

PROCESSES = 2


def launch(script, *arguments, check=True) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    paths = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, env=environment, timeout=300)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("distributed")
    dataset.save_to_disk(folder / "dataset")
    done = launch(ROOT / "tests" / "distributed_training.py", folder, *VARIANTS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_those_of_one_process_after_every_step(launched, variant, dataset, tmp_path):
    options = {name: value for name, value in VARIANTS[variant].items() if not name.startswith("ddp_")}
    _, expected = train(tmp_path, dataset, **options)
    first, second = (torch.load(launched / f"{variant} {rank}.pt") for rank in range(PROCESSES))
    sizes = [weights["backbone.layers.0.mixer.A_log"].shape[1] for weights in first]
    assert sizes[:12] == [16, 16, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4] and set(sizes[12:]) <= {4}
    for weights, same, reference in zip(first, second, expected, strict=True):
        assert_identical(weights, same)
        assert max((weights[name] - reference[name]).abs().max() for name in reference) < 1e-6


@pytest.fixture(scope="module")
def looped(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("loop")
    dataset.save_to_disk(folder / "dataset")
    done = launch(ROOT / "tests" / "distributed_loop.py", folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_loop_of_ones_own_trains_as_in_one_process(looped, dataset):
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
    train_and_cut(model, optimizer, batches_of(dataset, 0, 1, 8), lambda loss: loss.backward())
    first, second = (torch.load(looped / f"loop {rank}.pt") for rank in range(PROCESSES))
    reference = weights_of(model)
    assert_identical(first, second)
    assert reference["backbone.layers.0.mixer.A_log"].shape[1] == 8
    assert max((first[name] - reference[name]).abs().max() for name in reference) < 1e-6


def test_hooks_on_the_wrapper_outlive_a_cut(looped):
    for rank in range(PROCESSES):
        assert json.loads((looped / f"loop {rank}.json").read_text())["calls of the wrapper's hook"] == 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("data", "the calibration data ended after 3 batches, 4 are needed"),
        ("config", "the processes were given different configurations"),
        ("weights", "layer 0 A_log holds NaN or Inf"),
        ("activations", "the state energies are not finite"),
    ],
)
def test_a_fault_in_one_process_stops_all_with_one_error(looped, fault, message):
    errors = [json.loads((looped / f"loop {rank}.json").read_text())[fault] for rank in range(PROCESSES)]
    assert all(message in error for error in errors)
    if fault != "activations":  # there the sums over all processes are not finite, so each sees it by itself
        assert errors[0].startswith("process 1 of 2 failed, so none went on. ValueError: ")


def test_a_checkpoint_of_two_processes_resumes_in_one_and_the_other_way_round(launched, dataset, tmp_path):
    _, one_process = train(tmp_path / "one", dataset, save_strategy="steps", save_steps=4)
    done = launch(ROOT / "tests" / "distributed_training.py", launched, "resume", tmp_path / "one" / "checkpoint-4")
    assert done.returncode == 0
    resumed = torch.load(launched / "resume 0.pt")
    _, alone = train(tmp_path / "alone", dataset, resume_from=launched / "saving" / "checkpoint-4")
    for weights in (resumed, alone):
        assert len(weights) == 8
        for later, reference in zip(weights, one_process[4:], strict=True):
            assert max((later[name] - reference[name]).abs().max() for name in reference) < 1e-6
