"""This module takes times in turn, their ratios by round, peak memory, and what the machine can do at best."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from hf_compressm import env_report, install_scan

from .arguments import Arguments

SHARE = "share of the machine's limit"
RESET_PEAK = Path("/proc/self/clear_refs")  # Linux: "5" sets the peak of this process to what it holds now


def prepare(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    install_scan()


def machine(args: Arguments) -> dict:
    """Return what the numbers were taken on."""
    return {
        "cpu": processor(),
        "avx512": any(" avx512f " in line for line in cpu_info()),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        **env_report(),
    }


def processor() -> str:
    """Return the name of the processor."""
    names = [line.split(":", 1)[1].strip() for line in cpu_info() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cpu_info() -> list[str]:
    """Return what Linux says of the processor, and nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


@dataclass(frozen=True)
class Work:
    """Work is what has to be moved and computed at least: bytes, operations in float32, and those in matrices."""

    bytes_: float
    flops: float = 0
    matrix_flops: float = 0


@dataclass(frozen=True)
class Limits:
    """The limits say what the machine does at best: memory, float32 arithmetic, and products of matrices."""

    bytes_per_second: float
    flops_per_second: float
    matrix_flops_per_second: float

    def seconds(self, work: Work) -> float:
        """Return the least time for this work, memory and arithmetic in parallel."""
        arithmetic = work.flops / self.flops_per_second + work.matrix_flops / self.matrix_flops_per_second
        return max(work.bytes_ / self.bytes_per_second, arithmetic)


def measure_limits(device: str) -> Limits:
    """Measure a copy of a large tensor and products of matrices; those of a model are bfloat16 on a GPU."""
    size, side = (2**28, 8192) if device == "cuda" else (2**26, 1536)
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(7))

    def flops_per_second(dtype: torch.dtype) -> float:
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        return 2 * side**3 / min(timed(lambda: matrix @ matrix, device) for _ in range(7))

    exact = flops_per_second(torch.float32)
    return Limits(2 * 4 * size / copy, exact, flops_per_second(torch.bfloat16) if device == "cuda" else exact)


def time_in_turn(runs: dict[str, Callable], rounds: int, args: Arguments) -> dict[str, list[float]]:
    """Return seconds of each run by round; every other round goes backwards, so that none always follows another.

    Each runs once before, which warms it up. What has taken `patience` seconds in all is not timed again, and what
    the memory of a GPU does not hold is left out.
    """
    seconds: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            run()
            seconds[name] = []
        except torch.OutOfMemoryError:
            print(f"  {name} does not fit into memory.", flush=True)
    for i in range(rounds):
        names = [name for name, times in seconds.items() if i == 0 or sum(times) < args.patience]
        for name in names if i % 2 == 0 else reversed(names):
            seconds[name].append(timed(runs[name], args.device))
        print(f"\r  round {i + 1} of {rounds}", end="", flush=True)
    print("\r" + 30 * " ", end="\r")
    return seconds


def timed(function: Callable[[], object], device: str) -> float:
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def median(seconds: list[float]) -> float:
    return float(np.median(seconds))


def ratio_quartiles(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return first quartile, median and third quartile of the ratios by round, of the rounds that have both."""
    ratios = [n / d for n, d in zip(numerators, denominators, strict=False)]
    return np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()


def show(quartiles: list[float], digits: int = 2) -> str:
    """Return the median with the quartiles in brackets, if they differ."""
    first, middle, third = (f"{value:.{digits}f}" for value in quartiles)
    return f"{middle} [{first}, {third}]" if quartiles[0] < quartiles[2] else middle


def mebibytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:,.0f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return the table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def added_peaks(runs: dict[str, Callable], device: str) -> dict[str, int | None]:
    """Return the most bytes that each run holds beyond what is held already; None where that cannot be told.

    On a GPU they are those of torch's allocator; else those of the process, whose freed memory is given back to the
    system first.
    """
    gc.collect()
    added_peak = _added_on_gpu if device == "cuda" else _added_to_process
    return {name: added_peak(run) for name, run in runs.items()}


def added_peak(run: Callable, device: str) -> int | None:
    """Return what `added_peaks` says of a single run."""
    return added_peaks({"run": run}, device)["run"]


def _added_on_gpu(run: Callable) -> int | None:
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    try:
        run()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - held


def _added_to_process(run: Callable) -> int | None:
    if not RESET_PEAK.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    RESET_PEAK.write_text("5")
    held = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - held


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
