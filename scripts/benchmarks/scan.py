"""This study times one selective scan, forward and backward: this package's against others that Transformers runs."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.utils.import_utils import is_mambapy_available

from hf_compressm.architectures.foreign_kernels import reference_of
from hf_compressm.architectures.installed_scan import kernel_in_force
from hf_compressm.kernels import selective_scan

from .arguments import Arguments
from .measuring import SHARE, Limits, added_peak, mebibytes, median, ratio_quartiles, show, table, time_in_turn

TRANSFORMERS_SCAN = reference_of(modeling_mamba.mamba_selective_scan)  # the PyTorch one, even beside mamba-ssm
LOOP, MAMBAPY, MAMBA_SSM = "Transformers' loop", "mambapy", "mamba-ssm"
INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "delta_bias")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}  # of gradients; beyond it nothing is timed

# Per channel, state and position: Δ A, its power of two (six multiply-adds), Δ u B, the recurrence, C h; going back,
# the first four again and seven multiply-adds and two products for the gradients.
EXPONENTIAL_FLOPS = 12
FLOPS = (1 + EXPONENTIAL_FLOPS + 1 + 2 + 2) + (1 + EXPONENTIAL_FLOPS + 1 + 2 + 7 * 2)


def scans(device: str) -> dict[str, Callable[..., Tensor]]:
    """Return name → scan of (u, Δ, A, B, C, D, z, bias); ours come first, the fastest before the others."""
    own = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}[device]
    found = {name: partial(_own_scan, name) for name in own}
    if kernel_in_force(device) == "mamba_ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        found[MAMBA_SSM] = partial(selective_scan_fn, delta_softplus=True)
    if device == "cpu":
        if not is_mambapy_available():
            raise ValueError("mambapy is missing, and Transformers would silently run its loop: pip install mambapy.")
        found[MAMBAPY] = partial(TRANSFORMERS_SCAN, delta_softplus=True, use_mambapy=True)
        found[LOOP] = partial(TRANSFORMERS_SCAN, delta_softplus=True)
    return found


def _own_scan(name: str, u, dt, A, B, C, D, z, bias) -> Tensor:
    return selective_scan(u, dt, A, B, C, D, z, bias, softplus=True, implementation=name)


def study_scan(args: Arguments, limits: Limits) -> dict:
    """Measure all scans at one size, in time and memory, then by N, then by L."""
    names = list(scans(args.device))
    differences = {size: check_agreement(args, size) for size in {args.state_size, *args.state_sizes, 16}}
    print("Every scan gives the gradients of Transformers' loop.", flush=True)
    long = replace(args, batch_size=1, length=2048)
    peaks = {name: scan_peak(args, name) for name in names}
    long_peaks = {name: scan_peak(long, name) for name in names if name != LOOP}
    headline = scan_point(args, args.state_size, names, limits) | {"peak_bytes": peaks}
    by_state_size = sweep([(args, size) for size in sorted({*args.state_sizes, args.state_size})], limits)
    by_length = sweep([(replace(args, batch_size=1, length=length), 16) for length in args.lengths], limits)
    return {
        "gradient_differences": differences,
        "headline": headline,
        "peak_bytes_batch_1_L_2048": long_peaks,
        "by_state_size": by_state_size,
        "by_length": by_length,
    }


def sweep(points: list[tuple[Arguments, int]], limits: Limits) -> list[dict]:
    """Measure from small to large, each scan as far as `patience` allows."""
    names, results = list(scans(points[0][0].device)), []
    for args, size in points:
        result = scan_point(args, size, names, limits)
        names = [name for name in names if result["median_seconds"][name] < args.patience]
        results.append(result)
    return results


def scan_point(args: Arguments, size: int, names: list[str], limits: Limits) -> dict:
    shape = {"batch": args.batch_size, "L": args.length, "D": args.channels, "N": size, "dtype": args.dtype}
    print(f"Scan, {', '.join(f'{name} = {value}' for name, value in shape.items())}", flush=True)
    inputs, grad_output = scan_inputs(args, size)
    functions = {name: function for name, function in scans(args.device).items() if name in names}
    runs = {name: partial(gradients, function, inputs, grad_output) for name, function in functions.items()}
    for name, run in runs.items():
        if name not in (LOOP, MAMBAPY):
            run()  # warms up
    rounds = {name: args.slow_rounds if name in (LOOP, MAMBAPY) else args.rounds for name in runs}
    seconds = time_in_turn(runs, rounds, args.device)
    least = limits.seconds(least_bytes(args, size), FLOPS * args.batch_size * args.length * args.channels * size)
    medians = {name: median(values) for name, values in seconds.items()}
    first = next(iter(runs))
    return shape | {
        "median_seconds": medians,
        "ratio_quartiles": {name: ratio_quartiles(values, seconds[first]) for name, values in seconds.items()},
        "ratio_to_torch_quartiles": {n: ratio_quartiles(values, seconds["torch"]) for n, values in seconds.items()},
        "share_of_limit": {name: least / value for name, value in medians.items()},
        "limit_seconds": least,
        "seconds": seconds,
    }


def least_bytes(args: Arguments, size: int) -> int:
    """Return the bytes to read and write: inputs twice, y and its gradient, gradients once; parameters are small."""
    by_channel = 2 * 3 + 2 + 3  # u, Δ, z; y and its gradient; the gradients of u, Δ, z
    by_state = 2 * 2 + 2  # B, C; their gradients
    values = args.batch_size * args.length * (by_channel * args.channels + by_state * size)
    return values * torch.finfo(getattr(torch, args.dtype)).bits // 8


def scan_inputs(args: Arguments, size: int) -> tuple[list[Tensor], Tensor]:
    """Return what a freshly initialised mixer passes, in its memory layout, and a gradient for the output."""
    generator = torch.Generator().manual_seed(args.seed)
    random = partial(torch.randn, generator=generator)
    batch, channels, length = args.batch_size, args.channels, args.length
    step = torch.empty(channels).uniform_(math.log(0.001), math.log(0.1), generator=generator).exp()
    values = {
        "u": F.silu(random(batch, length, channels)).transpose(1, 2),
        "dt": 0.1 * random(batch, length, channels).transpose(1, 2),
        "A": -torch.arange(1.0, size + 1).repeat(channels, 1),
        "B": random(batch, length, size).transpose(1, 2),
        "C": random(batch, length, size).transpose(1, 2),
        "D": torch.ones(channels),
        "z": random(batch, length, channels).transpose(1, 2),
        "delta_bias": step.expm1().log(),  # inverse of softplus
    }
    narrow, moved = getattr(torch, args.dtype), {}
    for name in INPUTS:
        dtype = torch.float32 if name in ("A", "D", "delta_bias") else narrow
        moved[name] = values[name].to(args.device, dtype).requires_grad_()
    return list(moved.values()), random(batch, length, channels).transpose(1, 2).to(args.device, narrow)


def gradients(scan: Callable, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a scan, after its forward and backward pass."""
    return torch.autograd.grad(scan(*inputs), inputs, grad_output)


def check_agreement(args: Arguments, size: int) -> dict[str, float]:
    """Return how far each scan's gradients lie from those of Transformers' loop, relative to the largest entry."""
    inputs, grad_output = scan_inputs(replace(args, batch_size=2, length=50, channels=70), size)
    expected = gradients(partial(TRANSFORMERS_SCAN, delta_softplus=True), inputs, grad_output)
    differences = {}
    for name, scan in scans(args.device).items():
        found = gradients(scan, inputs, grad_output)
        by_input = [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]
        differences[name] = max(by_input)
        if not all(difference <= TOLERANCE[args.dtype] for difference in by_input):
            raise ValueError(
                f"N = {size}: {name} disagrees with the loop: {dict(zip(INPUTS, by_input, strict=True))}."
            )
    return differences


def scan_peak(args: Arguments, name: str) -> int | None:
    """Return the bytes that forward and backward hold beyond their inputs."""
    scan, inputs = scans(args.device)[name], scan_inputs(args, args.state_size)
    return added_peak(lambda: gradients(scan, *inputs), args.device)


def scan_tables(result: dict) -> str:
    head = result["headline"]
    first = next(iter(head["median_seconds"]))
    shape = ", ".join(f"{name} {head[name]}" for name in ("batch", "L", "D", "N", "dtype"))
    text = f"## One scan, forward and backward\n\n{shape}; quartiles in brackets\n\n"
    rows = [
        [
            name,
            f"{1000 * seconds:.1f}",
            show(head["ratio_quartiles"][name]),
            mebibytes(head["peak_bytes"][name]),
            f"{head['share_of_limit'][name]:.1%}",
        ]
        for name, seconds in head["median_seconds"].items()
    ]
    text += table(["", "ms", f"× {first}", "peak memory, MiB", SHARE], rows)
    peaks = ", ".join(f"{name} {mebibytes(peak)}" for name, peak in result["peak_bytes_batch_1_L_2048"].items())
    text += f"\nPeak memory at batch 1, L 2048, N {head['N']}, MiB: {peaks}.\n"
    for key, axis in (("by_state_size", "N"), ("by_length", "L")):
        points = result[key]
        names = list(points[0]["median_seconds"])
        rows = []
        for point in points:
            times = [point["median_seconds"].get(name) for name in names]
            cells = ["" if time is None else f"{1000 * time:,.1f}" for time in times]
            rows.append([str(point[axis]), *cells, f"{point['share_of_limit'][first]:.1%}"])
        text += f"\nms by {axis}, at batch {points[0]['batch']}"
        text += f", L {points[0]['L']}\n\n" if axis == "N" else f", N {points[0]['N']}\n\n"
        text += table([axis, *names, f"{first}: share of the limit"], rows)
    return text
