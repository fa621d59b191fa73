"""The studies and benchmarks as a user runs them, on a few steps: every arm, every table, every picture."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def reproduce(folder, *more, check=True) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "digits", "--output_dir", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "digits"
    return folder, reproduce(folder, "--max_steps", "40", "--seeds", "0").stdout


def test_a_study_runs_every_arm_and_tells_what_came_out(study):
    folder, output = study
    results = [json.loads(file.read_text()) for file in folder.glob("*/result.json")]
    by_arm = {result["arm"]: result for result in results}
    assert len(by_arm) == len(results) == 16
    reduced = by_arm["reduced in training, τ = 0.1"]["state_sizes"]
    assert reduced[0] < by_arm["full"]["state_sizes"][0] == 64
    for arm in ("scratch, as τ = 0.1", "truncated after training, as τ = 0.1", "random kept, as τ = 0.1"):
        assert by_arm[arm]["state_sizes"] == reduced
    assert all(0 < result["accuracy"] < 1 for result in results)
    assert all(f"| {arm} |" in output for arm in by_arm)
    assert (folder / "accuracy.png").stat().st_size > 10_000


def test_a_finished_study_is_not_run_again_but_reported(study):
    folder, output = study
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}
    again = reproduce(folder, "--max_steps", "40", "--seeds", "0").stdout
    assert {file: file.stat().st_mtime_ns for file in times} == times
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in (output, again)]
    assert tables[0] == tables[1] and len(tables[0]) == 18
    other = reproduce(folder, "--max_steps", "41", "--seeds", "0", check=False)
    assert other.returncode != 0 and "was made with other settings" in other.stderr


def test_the_cost_of_the_theory_is_measured(tmp_path):
    options = "--state_sizes 8 16 --state_size 16 --reduced_size 4 --length 16 --rounds 1 --threads 1".split()
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_analysis.py"), *options]
    command += ["--output_dir", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["analysis"]["seconds"].keys() == {"8", "16"}
    assert len(results["regulariser"]["seconds_of_a_run"]) == 5 and "| reduced to N = 4 |" in output
    assert (tmp_path / "analysis.png").stat().st_size > 5_000


BENCHMARK = """
    --batch_size 2 --rounds 2 --slow_rounds 1 --channels 8 --length 20 --state_size 6 --state_sizes 3 --lengths 20
    --block_size 20 --hidden_size 8 --num_hidden_layers 2 --vocab_size 50 --size_before 8 --size_after 2 --step_size 8
    --run_size 2 --run_steps 100 --decode_sizes 3 --decode_tokens 2 --threads 1
""".split()


def test_the_benchmark_measures_all_it_says_against_the_limits_of_the_machine(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *BENCHMARK, "--output_dir", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads((tmp_path / "benchmark.json").read_text())
    scans = {"cpp", "torch", "mambapy", "Transformers' loop"}
    assert results["scan"]["headline"]["median_seconds"].keys() == scans
    assert all(
        difference < 1e-4
        for by_scan in results["scan"]["gradient_differences"].values()
        for difference in by_scan.values()
    )
    step, cut = results["training"]["step"], results["training"]["cut"]
    assert step["median_seconds"].keys() == {"cpp", "torch", "mambapy"} and cut["sizes"] == [8, 2]
    assert 0 < results["training"]["run"]["share"]["analysis"] < 1
    shares = [
        *step["share_of_limit"].values(),
        *cut["share_of_limit"].values(),
        results["decoding"][0]["share_of_limit"],
    ]
    assert all(0 < share < 1 for share in shares)
    assert all(peak > 0 for peak in results["scan"]["peak_bytes_batch_1_L_2048"].values())
    assert (tmp_path / "benchmark.md").read_text() in output
    assert (tmp_path / "benchmark.png").stat().st_size > 20_000


REDUCTIONS = """
    --seeds 0 --criteria output magnitude --max_steps 20 --batches 1 --curve 1 2 --validation_sequences 8
    --hidden_size 16 --num_hidden_layers 2 --vocab_size 300 --processes 1
""".split()


def test_every_reduction_is_compared_and_a_finished_comparison_only_reported(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "compare_reductions.py"), *REDUCTIONS]
    command += ["--texts", "bible:16", "--output_dir", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads((tmp_path / "bible-16-0.json").read_text())
    found = {(e["criterion"], e["remedy"], e["divisor"]) for e in result["rises"]}
    remedies = ("none", "compensate", "compensate + refit")
    assert found == {(c, r, d) for c in ("output", "magnitude") for r in remedies for d in (2, 4, 8, 16)}
    assert len(result["curve"]) == 6 and len(result["predictions"]) == 4 * 3
    assert (tmp_path / "reductions.md").read_text() in output
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("rises", "calibration", "predictions"))
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == output
    assert {file: file.stat().st_mtime_ns for file in times} == times
