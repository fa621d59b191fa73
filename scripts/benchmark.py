"""Benchmarks on one machine: what is compared runs in turn, in one process, and is judged by its ratios in each round.

Without arguments, both studies: about three minutes on two CPU cores that have nothing else to do.

    python scripts/benchmark.py

`scan`: forward and backward of one selective scan, this package's against Transformers' two in PyTorch (mambapy's
parallel scan and the reference loop), in time and in peak memory; before that their gradients are checked to agree.
`cut`: the training step of a model that was cut in mid-training, against a model built at that size and the uncut one.

    python scripts/benchmark.py scan --state_sizes 16 64 128
    python scripts/benchmark.py cut --state_size_before 128 --state_size_after 16 --rounds 50
    python scripts/benchmark.py --device cuda --block_size 512 --channels 1024 --hidden_size 512
"""

import inspect
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import HfArgumentParser, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.utils.import_utils import is_mambapy_available

from hf_compressm import CompreSSMConfig, analyze, compress, install_scan, parameter_groups

TRANSFORMERS_SCAN = inspect.unwrap(modeling_mamba.mamba_selective_scan)  # the PyTorch one, even beside mamba-ssm
LOOP = "reference loop"
SCANS: dict[str, Callable[..., Tensor]] = {
    "ours": lambda *inputs: modeling_mamba.mamba_selective_scan(*inputs, delta_softplus=True),  # as installed
    "mambapy": partial(TRANSFORMERS_SCAN, delta_softplus=True, use_mambapy=True),
    LOOP: partial(TRANSFORMERS_SCAN, delta_softplus=True),
}
INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "delta_bias")
AGREEMENT = 1e-4  # relative difference of float32 gradients from the reference loop's at which nothing is timed
STEP_TARGET = 1.03  # a step after the cut, relative to one of a model built at that size


@dataclass
class Arguments:
    """What is measured."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "CPU threads of torch."})
    output: str = field(default="runs/benchmark.json", metadata={"help": "JSON file to write."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per batch."})
    block_size: int = field(default=128, metadata={"help": "Sequence length L, in tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of the random inputs, tokens and weights."})

    channels: int = field(default=256, metadata={"help": "scan: channels D."})
    state_sizes: list[int] = field(default_factory=lambda: [128], metadata={"help": "scan: state sizes N."})
    scan_rounds: int = field(default=10, metadata={"help": "scan: runs of each scan."})
    loop_rounds: int = field(default=3, metadata={"help": "scan: runs of the reference loop, which is slow."})

    hidden_size: int = field(default=128, metadata={"help": "cut: width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "cut: number of Mamba blocks."})
    vocab_size: int = field(default=4096, metadata={"help": "cut: tokens of the vocabulary."})
    state_size_before: int = field(default=64, metadata={"help": "cut: state size N before the cut."})
    state_size_after: int = field(default=12, metadata={"help": "cut: state size N after the cut."})
    steps_before: int = field(default=5, metadata={"help": "cut: untimed training steps of every model."})
    rounds: int = field(default=30, metadata={"help": "cut: timed steps of each model."})


def main() -> None:
    parser = HfArgumentParser(Arguments)
    parser.add_argument("study", nargs="?", choices=["scan", "cut", "both"], default="both", help="What to measure.")
    args, selected = parser.parse_args_into_dataclasses()
    prepare(args)

    results = {"date": datetime.now().isoformat(timespec="seconds"), "machine": machine(args), "options": asdict(args)}
    print("\n".join(f"{name}: {value}" for name, value in results["machine"].items()))
    if results["machine"]["load_average"] > 0.5:
        print("The machine was busy in the last minute; on one that is, these times mean little.")
    if selected.study in ("scan", "both"):
        results["scan"] = study_scan(args)
    if selected.study in ("cut", "both"):
        results["cut"] = study_cut(args)

    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nWritten to {args.output}")


def prepare(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    install_scan()


def machine(args: Arguments) -> dict:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# The study of the scan


def study_scan(args: Arguments) -> list[dict]:
    if not is_mambapy_available():
        raise ValueError("mambapy is not installed, Transformers would silently take its loop: pip install mambapy.")
    print("\nPeak memory, each scan in a fresh process …", flush=True)
    # Before anything else: on Linux a child's peak starts at its parent's, so this process has to be small still.
    peaks = {size: peak_memories(args, size) for size in args.state_sizes}
    return [scan_of_size(args, size, peaks[size]) for size in args.state_sizes]


def scan_of_size(args: Arguments, size: int, peaks: dict[str, int]) -> dict:
    shape = {"batch": args.batch_size, "L": args.block_size, "D": args.channels, "N": size}
    print(f"\nScan, {', '.join(f'{name} = {value}' for name, value in shape.items())}", flush=True)
    inputs, grad_output = scan_inputs(args, size, args.block_size)
    differences = check_agreement(inputs, grad_output)  # also the warm-up

    runs = {name: partial(gradients, scan, inputs, grad_output) for name, scan in SCANS.items()}
    seconds = time_in_turn(runs, dict.fromkeys(SCANS, args.scan_rounds) | {LOOP: args.loop_rounds}, args.device)
    result = shape | {
        "gradient_difference": differences,
        "median_seconds": medians(seconds),
        "ratio_to_ours_quartiles": {name: ratio_quartiles(seconds[name], seconds["ours"]) for name in SCANS},
        "peak_bytes": peaks,
        "seconds": seconds,
    }
    print_scan(result)
    return result


def print_scan(result: dict) -> None:
    peaks = result["peak_bytes"]
    print(f"\n{'':14s}  seconds  × ours [quartiles]     peak memory  × ours")
    for name, seconds in result["median_seconds"].items():
        print(
            f"{name:14s}  {seconds:7.3f}  {show(result['ratio_to_ours_quartiles'][name], 2):20s} "
            f"{peaks[name] / 2**20:8,.0f} MiB  {peaks[name] / max(peaks['ours'], 1):6.2f}"
        )


def scan_inputs(args: Arguments, size: int, length: int) -> tuple[list[Tensor], Tensor]:
    """What a freshly initialised mixer passes, in its memory layout, and a gradient for the output."""
    generator = torch.Generator().manual_seed(args.seed)
    random = partial(torch.randn, generator=generator)
    batch, channels = args.batch_size, args.channels
    step = torch.empty(channels).uniform_(np.log(0.001), np.log(0.1), generator=generator).exp()
    values = {
        "u": F.silu(random(batch, channels, length)),
        "dt": 0.1 * random(batch, channels, length),
        "A": -torch.arange(1.0, size + 1).repeat(channels, 1),
        "B": random(batch, length, size).transpose(1, 2),
        "C": random(batch, length, size).transpose(1, 2),
        "D": torch.ones(channels),
        "z": random(batch, length, channels).transpose(1, 2),
        "delta_bias": step.expm1().log(),  # inverse of softplus
    }
    inputs = [values[name].to(args.device).requires_grad_() for name in INPUTS]
    return inputs, random(batch, channels, length).to(args.device)


def gradients(scan: Callable, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward of a scan."""
    return torch.autograd.grad(scan(*inputs), inputs, grad_output)


def check_agreement(inputs: list[Tensor], grad_output: Tensor) -> dict[str, float]:
    """Largest difference of each scan's gradients from the reference loop's, relative to the largest entry."""
    expected = gradients(SCANS[LOOP], inputs, grad_output)
    differences = {}
    for name in ("ours", "mambapy"):
        found = gradients(SCANS[name], inputs, grad_output)
        by_input = [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]
        differences[name] = max(by_input)
        print(f"largest relative gradient difference, {name} from {LOOP}: {max(by_input):.1e}", flush=True)
        if not all(difference <= AGREEMENT for difference in by_input):
            raise ValueError(f"{name} disagrees with the {LOOP}: {dict(zip(INPUTS, by_input, strict=True))}.")
    return differences


def peak_memories(args: Arguments, size: int) -> dict[str, int]:
    """Bytes that forward and backward of each scan add to the peak of a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return {name: pool.submit(added_peak, args, name, size).result() for name in SCANS}


def added_peak(args: Arguments, name: str, size: int) -> int:
    prepare(args)
    gradients(SCANS[name], *scan_inputs(args, size=2, length=8))  # loads libraries, starts threads
    inputs, grad_output = scan_inputs(args, size, args.block_size)
    before = peak_bytes(args.device)
    gradients(SCANS[name], inputs, grad_output)
    return peak_bytes(args.device) - before


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# The study of the cut


def study_cut(args: Arguments) -> dict:
    print(f"\nTraining step, batch = {args.batch_size}, L = {args.block_size}", flush=True)
    before, after = args.state_size_before, args.state_size_after
    trainings = {"cut": Training(args, before), "uncut": Training(args, before), "built": Training(args, after)}
    cut_seconds = trainings["cut"].cut(after)
    print(f"analysis and surgery: {cut_seconds:.2f} s", flush=True)
    for training in trainings.values():
        training.step()  # warm-up at the new size

    runs = {name: training.step for name, training in trainings.items()}
    seconds = time_in_turn(runs, dict.fromkeys(runs, args.rounds), args.device)
    result = {
        "median_seconds": medians(seconds),
        "cut_to_built_quartiles": ratio_quartiles(seconds["cut"], seconds["built"]),
        "uncut_to_cut_quartiles": ratio_quartiles(seconds["uncut"], seconds["cut"]),
        "analysis_and_surgery_seconds": cut_seconds,
        "seconds": seconds,
    }
    print_cut(result, {"cut": f"cut {before} → {after}", "uncut": f"uncut, {before}", "built": f"built at {after}"})
    return result


def print_cut(result: dict, labels: dict[str, str]) -> None:
    to_built, speed_up = result["cut_to_built_quartiles"], result["uncut_to_cut_quartiles"]
    print()
    for name, label in labels.items():
        print(f"{label:12s}  {1000 * result['median_seconds'][name]:8.1f} ms per step")
    verdict = "met" if to_built[1] <= STEP_TARGET else "missed"
    print(f"cut / built:  {show(to_built, 3)} [quartiles]; target at most {STEP_TARGET}: {verdict}")
    print(f"uncut / cut:  {show(speed_up, 3)} [quartiles], the speed-up of training by the cut")


class Training:
    """A small Mamba with its AdamW on random tokens, after a few steps."""

    def __init__(self, args: Arguments, size: int):
        config = MambaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            state_size=size,
        )
        self.device, self.model = args.device, MambaForCausalLM(config).to(args.device).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, weight_decay=0.1), lr=1e-3)
        self.batch = torch.randint(args.vocab_size, (args.batch_size, args.block_size), device=args.device)
        for _ in range(args.steps_before):
            self.step()

    def step(self) -> None:
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cut(self, size: int) -> float:
        """Cut to `size` states; the seconds it took."""
        config = CompreSSMConfig(target_state_size=size)
        batches = [{"input_ids": self.batch}] * config.calibration_batches
        return timed(lambda: compress(self.model, analyze(self.model, batches, config), self.optimizer), self.device)


# Measuring


def time_in_turn(runs: dict[str, Callable], rounds: dict[str, int], device: str) -> dict[str, list[float]]:
    """Seconds of every run by round; every other round goes backwards, so that none always follows the same other."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(max(rounds.values())):
        names = [name for name in runs if i < rounds[name]]
        for name in names if i % 2 == 0 else reversed(names):
            seconds[name].append(timed(runs[name], device))
        print(f"  round {i + 1:2d}: " + ", ".join(f"{name} {seconds[name][-1]:.3f} s" for name in names), flush=True)
    return seconds


def timed(function: Callable[[], object], device: str) -> float:
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in seconds.items()}


def ratio_quartiles(numerators: list[float], denominators: list[float]) -> list[float]:
    """First quartile, median and third quartile of the ratios by round, of the rounds that have both."""
    ratios = [n / d for n, d in zip(numerators, denominators, strict=False)]
    return np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()


def show(quartiles: list[float], digits: int) -> str:
    first, median, third = (f"{value:.{digits}f}" for value in quartiles)
    return f"{median} [{first}, {third}]"


if __name__ == "__main__":
    main()
