"""The benchmark of speed: as a user runs it, tiny, and what its numbers rest on."""

import json
import time
from importlib import import_module

import pytest
import torch
from conftest import ROOT
from processes import run_program

BENCHMARK = """
    --rounds 2 --threads 1 --state_size 6 --num_hidden_layers 2 --vocab_size 50 --run_sizes 8 2 --run_steps 100
    --decode_sizes 3 --decode_tokens 2 --decode_batches 1 2 --long_length 80
    --batch_size 2 --length 20 --hidden_size 8 --state_sizes 3 --lengths 20 --step_sizes 8 --size_after 2
    --mamba2_heads 2 --mamba2_head_dim 8 --mamba2_length 20 --mamba2_state_sizes 3 --mamba2_lengths 20 40
    --mamba2_step_sizes 3 6 --mamba2_size_after 2 --throughput_sizes 6 3
""".split()
SCANS = {
    "mamba": {"cpp", "torch", "mambapy", "Transformers' loop"},
    "mamba2": {"cpp", "torch", "Transformers", "recurrence"},
}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The folder and what is in its JSON, after a run of all studies."""
    folder = tmp_path_factory.mktemp("benchmark")
    options = [*BENCHMARK, "--output_dir", folder]
    output = run_program(ROOT / "scripts" / "benchmark.py", *options, OMP_THREAD_LIMIT="1").stdout
    assert (folder / "benchmark.md").read_text() in output
    return folder, json.loads((folder / "benchmark.json").read_text())


@pytest.mark.parametrize("family", SCANS)
def test_a_scan_is_compared_with_others_after_their_gradients(benchmark, family):
    scan = benchmark[1][family]["scan"]
    medians = scan["headline"]["median_seconds"]
    assert medians.keys() - {"mamba-scan-lite"} == SCANS[family] and list(medians)[:2] == ["cpp", "torch"]
    differences = [d for by_scan in scan["gradient_differences"].values() for d in by_scan.values()]
    assert len(differences) == 3 * len(medians) and all(difference < 1e-4 for difference in differences)
    assert scan["long"]["L"] == 80 and scan["long"]["peak_bytes"].keys() == medians.keys()
    assert all(peak >= 0 for peak in scan["headline"]["peak_bytes"].values())
    assert [point["N"] for point in scan["by_state_size"]] == [3, 6]
    assert [point["L"] for point in scan["by_length"]] == {"mamba": [20], "mamba2": [20, 40]}[family]
    assert all(0 < share < 1 for point in scan["by_length"] for share in point["share_of_limit"].values())


@pytest.mark.parametrize("family", SCANS)
def test_a_training_step_is_timed_by_scan_and_after_a_cut_in_each_basis(benchmark, family):
    training = benchmark[1][family]["training"]
    other = {"mamba": "mambapy", "mamba2": "Transformers"}[family]
    for point in training["step"]:
        assert list(point["median_seconds"]) == ["cpp", "torch", other]
        assert all(0 < share < 1 for share in point["share_of_limit"].values())
    bases = {"mamba": ["axis"], "mamba2": ["axis", "balanced"]}[family]
    assert training["cut"]["sizes"] == [6, 2] and training["cut"]["bases"] == bases
    assert list(training["cut"]["ratio_to_built_quartiles"]) == ["uncut", *bases, "built"]
    assert all(0 < share < 1 for share in training["cut"]["share_of_limit"].values())
    assert 0 < training["run"]["share"]["analysis"] < 1


@pytest.mark.parametrize("family", SCANS)
def test_the_price_of_a_state_is_told_beside_that_of_the_fewest(benchmark, family):
    throughput = benchmark[1][family]["throughput"]
    speeds, prices = throughput["tokens_per_second"], throughput["price_quartiles"]
    balanced = {"mamba": [], "mamba2": ["3 balanced of 6"]}[family]
    assert list(speeds) == list(prices) == ["6", "3", *balanced] and prices["3"] == [1, 1, 1]
    assert all(speed > 0 for speed in speeds.values()) and prices["6"][0] <= prices["6"][1] <= prices["6"][2]


@pytest.mark.parametrize("family", SCANS)
def test_generation_is_timed_step_by_step_and_by_generate(benchmark, family):
    points = benchmark[1][family]["decoding"]
    assert [(point["N"], point["batch"]) for point in points] == [(3, 1), (3, 2)]
    assert points[1]["bytes_of_state"] == 4 * 2 * 3 * 16 * 2  # float32: batch, N, channels, layers
    assert all(list(p["tokens_per_second"]) == ["hf_compressm", "Transformers", "model.generate"] for p in points)
    assert all(0 < point["share_of_limit"] < 1 for point in points)


def test_one_page_and_one_picture_tell_of_both_families(benchmark):
    folder, _ = benchmark
    text = (folder / "benchmark.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Mamba-1", "## Mamba-2"]
    assert "| cut 6 → 2, balanced |" in text and "cpp: µs per token" in text
    assert (folder / "benchmark.png").stat().st_size > 20_000


@pytest.fixture
def scripts(monkeypatch):
    """Imports a module of the scripts."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module


def test_what_is_slow_is_timed_once_and_what_does_not_fit_not_at_all(scripts):
    args = scripts("benchmarks.arguments").Arguments(patience=0.01)

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = {"quick": lambda: None, "slow": lambda: time.sleep(0.02), "too large": too_large}
    seconds = scripts("benchmarks.measuring").time_in_turn(runs, 5, args)
    assert {name: len(values) for name, values in seconds.items()} == {"quick": 5, "slow": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SCANS)
def test_gradients_are_as_exact_as_their_dtype(scripts, family, dtype):
    family = scripts("benchmark").FAMILIES[family](scripts("benchmarks.arguments").Arguments(dtype=dtype))
    differences = scripts("benchmarks.scan").check_agreement(family, 16)
    assert {"cpp", "torch"} <= differences.keys()
    assert max(differences.values()) < {"float32": 1e-5, "bfloat16": 2**-7}[dtype]


def test_a_scan_with_other_gradients_is_not_timed(scripts):
    args = scripts("benchmarks.arguments").Arguments(mamba2_head_dim=4)
    family = scripts("benchmarks.mamba2_family").Mamba2(args)
    right, scan = family.scans(), scripts("benchmarks.scan")
    assert max(scan.check_agreement(family, 5).values()) < 1e-5
    family.scans = lambda: right | {"wrong": lambda *inputs: 1.01 * right["torch"](*inputs)}
    with pytest.raises(ValueError, match="Mamba-2, N = 5: the gradients of wrong are off by"):
        scan.check_agreement(family, 5)


def test_sizes_for_a_gpu_are_those_of_the_published_models(scripts):
    args, families, studies = scripts("benchmark").parse_arguments(["--device", "cuda", "mamba2", "scan"])
    assert (families, studies) == (["mamba2"], ["scan"])
    mamba1, mamba2 = (family(args) for family in scripts("benchmark").FAMILIES.values())
    assert mamba1.shape == mamba2.shape and mamba1.shape.channels == 2 * 768
    assert mamba1.own_scans == ["triton", "torch"] and mamba2.own_scans[-1] == "torch"
    assert scripts("benchmark").parse_arguments(["mamba"])[1:] == (
        ["mamba"],
        ["scan", "training", "throughput", "decoding"],
    )
