"""A run that is killed at any moment goes on from its last whole checkpoint, and ends as if nothing had happened."""

import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_identical
from processes import run_program
from safetensors.torch import load_file

from hf_compressm.storage.checkpoint import last_complete_checkpoint
from hf_compressm.storage.history import load_history

SCRIPT = ROOT / "tests" / "training" / "killed_training.py"
MOMENTS = {
    "analysis": "choose_sizes:2",  # of the second cut
    "surgery": "swap_parameter:2",  # one tensor of the first cut is new, the others are not
    "saving": "_save_rng_state:8",  # weights and optimizer of step 8 are written, the rest is not
}


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(
    scope="module", params=["mamba", pytest.param("mamba2-axis", marks=pytest.mark.slow), "mamba2-balanced"]
)
def undisturbed(request, tmp_path_factory, dataset):
    """(folder with the data, weights at the end, seconds of training)."""
    folder = tmp_path_factory.mktemp("kill") / request.param
    dataset.save_to_disk(folder / "dataset")
    run = start(folder / "undisturbed")
    assert run.stdout.readline() == "starting\n"
    started = time.perf_counter()
    assert "trained\n" in iter(run.stdout.readline, "")
    seconds = time.perf_counter() - started
    run.communicate()
    assert run.returncode == 0
    return folder, load_file(folder / "undisturbed" / "weights.safetensors"), seconds


def assert_it_goes_on(folder, weights) -> None:
    assert not (folder / "weights.safetensors").exists()
    run_program(SCRIPT, folder)
    assert_identical(load_file(folder / "weights.safetensors"), weights)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_during(undisturbed, moment):
    folder, weights, _ = undisturbed
    run = run_program(SCRIPT, folder / moment, MOMENTS[moment], check=False)
    assert run.returncode == -signal.SIGKILL
    if moment == "saving":
        half = folder / moment / "checkpoint-8"
        assert (half / "model.safetensors").exists() and not (half / "trainer_state.json").exists()
    assert_it_goes_on(folder / moment, weights)


def test_a_run_whose_disk_fills(undisturbed):
    folder, weights, _ = undisturbed
    mine = folder / "full"
    run = run_program(SCRIPT, mine, "--full-after", "7", check=False)
    assert run.returncode > 0 and "File too large" in run.stderr.splitlines()[-1]
    assert last_complete_checkpoint(mine) == str(mine / "checkpoint-6")
    assert load_history(mine / "checkpoint-6").state_sizes == {0: 8, 1: 8}
    assert not list(mine.rglob("*.tmp"))
    assert_it_goes_on(mine, weights)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_a_random_moment(undisturbed, number):
    folder, weights, seconds = undisturbed
    draw = random.Random(number)
    while True:  # until a run is not done before it is killed
        mine = folder / f"{number}-{draw.random()}"
        run = start(mine)
        assert run.stdout.readline() == "starting\n"
        time.sleep(draw.uniform(0, seconds))
        run.kill()
        if "trained" not in run.stdout.read():
            break
    print(sorted(path.name for path in mine.glob("checkpoint-*")))
    assert_it_goes_on(mine, weights)
