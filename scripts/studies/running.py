"""Runs of a study, each in a process of its own: one that left its result is not repeated.

A study is anything with `perform(run, folder) -> dict`, `settings(run) -> dict` and `line(result) -> str`; a run has
an `arm`, a `seed` and a `name` for its folder. All that a result depends on is written beside it and compared.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from hf_compressm.files import write_aside, write_json

GATHERED = "results.json"  # of all runs


def carry_out_all(study, runs: Sequence, root: Path, jobs: int) -> dict[str, dict]:
    """Name → result of all runs, `jobs` at a time, with a line for each that is done.

    Raises:
        ValueError: there is a result, but of other settings.
    """
    results, started = {}, time.perf_counter()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(carry_out, study, run, root, threads) for run in runs]
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
    """(run, result): from its file where there is one, otherwise performed, with a log of its own."""
    torch.set_num_threads(threads)
    folder = root / run.name
    if not result_file(folder).exists():
        folder.mkdir(parents=True, exist_ok=True)
        disable_progress_bar()
        with open(folder / "log.txt", "a") as log, redirect_stdout(log):
            result = study.perform(run, folder)
        described = {"arm": run.arm, "seed": run.seed, "settings": as_json(study.settings(run))}
        write_json(result_file(folder), described | result)
    result = json.loads(result_file(folder).read_text())
    if result["settings"] != as_json(study.settings(run)):
        raise ValueError(
            f"{result_file(folder)} was made with other settings: give another --output_dir, or delete {folder}."
        )
    return run, result


def result_file(folder: Path) -> Path:
    """Where a run leaves its result."""
    return folder / "result.json"


def all_results(root: Path) -> list[dict]:
    """What there is, rounded, by arms and seeds: of the runs, or where there are none, of what was gathered."""
    texts = [file.read_text() for file in root.glob(f"*/{result_file(Path()).name}")]
    if not texts and (root / GATHERED).exists():
        return json.loads((root / GATHERED).read_text())
    results = [json.loads(text, parse_float=rounded) for text in texts]
    return sorted(results, key=lambda result: (result["arm"], result["seed"]))


def gather(root: Path, results: list[dict]) -> None:
    """Put the results into one file, a line each, of which the report can be made again without the runs."""
    lines = map(json.dumps, results)
    write_aside(root / GATHERED, lambda path: path.write_text("[\n" + ",\n".join(lines) + "\n]\n"))


def rounded(number: str) -> float:
    """To six significant digits, which is more than any figure shows."""
    return float(f"{float(number):.6g}")


def name_of(arm: str, seed: int) -> str:
    """A name for the folder of a run."""
    return f"{arm} seed {seed}".replace(" ", "_").replace("/", "-")


def as_json(content):
    """What would be read after writing: tuples as lists."""
    return json.loads(json.dumps(content))
