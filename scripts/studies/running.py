"""This module carries out the runs of a study, each in its own process; one that has a result is not repeated.

A study is anything with `perform(run, folder) -> dict`, `settings(run) -> dict` and `line(result) -> str`; a run has
an `arm`, a `seed` and a `name` for its folder. All that a result depends on is written beside it and compared.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path

import torch
from benchmarks.measuring import processor
from transformers.utils.logging import disable_progress_bar

from hf_compressm.storage.files import write_aside, write_json

GATHERED = "results.json"  # of all runs


def carry_out_all(study, runs: Sequence, root: Path, jobs: int) -> dict[str, dict]:
    """Return name → result of all runs; perform those without one, `jobs` at a time, and print a line for each.

    Raises:
        ValueError: a result has other settings. It is raised before anything is performed.
    """
    there_are = {name_of(result["arm"], result["seed"]): result for result in all_results(root)}
    results = {run.name: there_are[run.name] for run in runs if run.name in there_are}
    for run in runs:
        if run.name in results and results[run.name]["settings"] != as_read(study.settings(run)):
            raise ValueError(
                f"the result of {run.name} in {root} was made with other settings: give another --output_dir, or "
                f"delete the folder of the run, and {GATHERED}."
            )
    started, threads = time.perf_counter(), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(carry_out, study, run, root, threads) for run in runs if run.name not in results]
        try:
            for future in as_completed(futures):
                run, result = future.result()
                results[run.name] = result
                progress = f"[{len(results)}/{len(runs)}, {time.perf_counter() - started:.0f} s]"
                print(f"{progress} {run.arm}, seed {run.seed}: {study.line(result)}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def carry_out(study, run, root: Path, threads: int) -> tuple:
    """Return (run, result), and leave the result in the run's folder, beside a log."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    folder = root / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, redirect_stdout(log):
        result = study.perform(run, folder)
    described = {"arm": run.arm, "seed": run.seed, "machine": machine(), "settings": study.settings(run)} | result
    write_json(result_file(folder), described)
    return run, as_read(described)


def machine() -> str:
    """Return the name of the processor, and of the GPU if there is one: times compare on the same machine alone."""
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([processor(), *gpu])


def result_file(folder: Path) -> Path:
    """Return the file in which a run leaves its result."""
    return folder / "result.json"


def all_results(root: Path) -> list[dict]:
    """Return all results, rounded, by arms and seeds: those in the runs' folders, and those gathered before."""
    gathered = json.loads((root / GATHERED).read_text()) if (root / GATHERED).exists() else []
    of_runs = [
        json.loads(file.read_text(), parse_float=rounded) for file in root.glob(f"*/{result_file(Path()).name}")
    ]
    results = {(result["arm"], result["seed"]): result for result in [*gathered, *of_runs]}
    return [results[key] for key in sorted(results)]


def by_arm(results: Iterable[dict]) -> dict[str, list[dict]]:
    """Return the results of each arm, in their order."""
    arms: dict[str, list[dict]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    return arms


def gather(root: Path, results: list[dict]) -> None:
    """Write the results into one file, a line each, from which the report can be made again without the runs."""
    lines = map(json.dumps, results)
    write_aside(root / GATHERED, lambda path: path.write_text("[\n" + ",\n".join(lines) + "\n]\n"))


def rounded(number: str) -> float:
    """Round to six significant digits, which is more than any figure shows."""
    return float(f"{float(number):.6g}")


def name_of(arm: str, seed: int) -> str:
    """Return a name for the folder of a run."""
    return f"{arm} seed {seed}".replace(" ", "_").replace("/", "-")


def as_read(content):
    """Return what `all_results` would read after writing: tuples as lists, rounded."""
    return json.loads(json.dumps(content), parse_float=rounded)
