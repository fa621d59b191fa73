"""This study times one scan, forward and backward: this package's against others that its family has."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .family import Family, Shape
from .measuring import SHARE, Limits, added_peaks, mebibytes, median, ratio_quartiles, show, table, time_in_turn

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}  # of gradients; beyond it nothing is timed


def study_scan(family: Family, limits: Limits) -> dict:
    """Measure all scans at one size, in time and memory, then by N, then by L."""
    shape, patience = family.shape, family.args.patience
    sizes = sorted({*family.state_sizes, shape.state_size})
    by_length = [Shape(1, length, shape.channels, family.size_by_length) for length in family.lengths]
    by_size = [Shape(shape.batch, shape.length, shape.channels, size) for size in sizes]
    differences = {size: check_agreement(family, size) for size in {*sizes, family.size_by_length}}
    print(f"Every scan of {family.title} gives the same gradients.", flush=True)
    headline = scan_point(family, shape, list(family.scans()), limits)
    quick = [name for name, seconds in headline["median_seconds"].items() if seconds < patience]
    long = Shape(1, family.args.long_length, shape.channels, shape.state_size)
    return {
        "gradient_differences": differences,
        "headline": headline | {"peak_bytes": scan_peaks(family, shape, list(headline["median_seconds"]))},
        "long": {"batch": 1, "L": long.length, "N": long.state_size, "peak_bytes": scan_peaks(family, long, quick)},
        "by_state_size": sweep(family, by_size, limits, {shape: headline}),
        "by_length": [
            point | {"peak_bytes": scan_peaks(family, shape, family.own_scans)}
            for shape, point in zip(by_length, sweep(family, by_length, limits, {}), strict=True)
        ],
    }


def check_agreement(family: Family, size: int) -> dict[str, float]:
    """Return how far each scan's gradients lie from the reference's in float32, relative to the largest entry.

    Raises:
        ValueError: a scan has other gradients: nothing is timed then.
    """
    checked = Shape(family.checked.batch, family.checked.length, family.checked.channels, size)
    inputs, grad_output = family.scan_inputs(checked)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = gradients(family.reference, exact, grad_output)
    differences = {}
    for name, scan in family.scans().items():
        found = gradients(scan, inputs, grad_output)
        by_input = [float((f.float() - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]
        differences[name] = max(by_input)
        if not all(difference <= TOLERANCE[family.args.dtype] for difference in by_input):
            told = dict(zip(family.inputs, by_input, strict=True))
            raise ValueError(f"{family.title}, N = {size}: the gradients of {name} are off by {told}.")
    return differences


def gradients(scan: Callable, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a scan, after its forward and backward pass."""
    output = scan(*inputs)
    return torch.autograd.grad(output, inputs, grad_output.to(output.dtype))


def sweep(family: Family, shapes: list[Shape], limits: Limits, known: dict[Shape, dict]) -> list[dict]:
    """Measure from small to large what is not known yet, each scan of others as far as `patience` allows."""
    names, own, results = list(family.scans()), family.own_scans, []
    for shape in shapes:
        result = known.get(shape) or scan_point(family, shape, names, limits)
        seconds = result["median_seconds"]
        names = [name for name in names if name in own or seconds.get(name, math.inf) < family.args.patience]
        results.append(result)
    return results


def scan_point(family: Family, shape: Shape, names: list[str], limits: Limits) -> dict:
    told = {"batch": shape.batch, "L": shape.length, "channels": shape.channels, "N": shape.state_size}
    told["dtype"] = family.args.dtype
    print(f"Scan of {family.title}, {', '.join(f'{name} = {value}' for name, value in told.items())}", flush=True)
    inputs, grad_output = family.scan_inputs(shape)
    runs = {
        name: partial(gradients, scan, inputs, grad_output) for name, scan in family.scans().items() if name in names
    }
    seconds = time_in_turn(runs, family.args.rounds, family.args)
    least = limits.seconds(family.least_work(shape, getattr(torch, family.args.dtype)))
    return told | compared(seconds, least)


def compared(seconds: dict[str, list[float]], least: float) -> dict:
    """Return what is told of times by round: their medians, and ratios to the first, to `torch` and to the limit."""
    medians = {name: median(values) for name, values in seconds.items()}
    first = next(iter(seconds))
    return {
        "median_seconds": medians,
        "ratio_quartiles": {name: ratio_quartiles(values, seconds[first]) for name, values in seconds.items()},
        "ratio_to_torch_quartiles": {n: ratio_quartiles(values, seconds["torch"]) for n, values in seconds.items()},
        "share_of_limit": {name: least / value for name, value in medians.items()},
        "limit_seconds": least,
        "seconds": seconds,
    }


def scan_peaks(family: Family, shape: Shape, names: list[str]) -> dict[str, int | None]:
    """Return the bytes that forward and backward of each scan hold beyond their inputs."""
    scans, inputs = family.scans(), family.scan_inputs(shape)
    return added_peaks({name: partial(gradients, scans[name], *inputs) for name in names}, family.args.device)


def scan_tables(family: Family, result: dict) -> str:
    head = result["headline"]
    names = list(head["median_seconds"])
    first = names[0]
    shape = ", ".join(f"{name} {head[name]}" for name in ("batch", "L", "channels", "N", "dtype"))
    text = f"### One scan, forward and backward\n\n{shape}; quartiles in brackets\n\n"
    rows = [[name, *time_cells(head, name), mebibytes(head["peak_bytes"][name])] for name in names]
    text += table(["", *time_header(first), "peak memory, MiB"], rows)
    long = result["long"]
    peaks = ", ".join(f"{name} {mebibytes(peak)}" for name, peak in long["peak_bytes"].items())
    text += f"\nPeak memory at batch 1, L {long['L']}, N {long['N']}, MiB: {peaks}.\n"

    points = result["by_state_size"]
    rows = [[str(point["N"]), *milliseconds(point, names), _share(point, first)] for point in points]
    text += f"\nms by N, at batch {points[0]['batch']}, L {points[0]['L']}\n\n"
    text += table(["N", *names, f"{first}: share of the limit"], rows)

    points, rows = result["by_length"], []
    for point in points:
        per_token = 1e6 * point["median_seconds"][first] / point["L"]
        ours = [f"{per_token:.2f}", mebibytes(point["peak_bytes"][first]), _share(point, first)]
        rows.append([str(point["L"]), *milliseconds(point, names), *ours])
    text += f"\nms by L, at batch {points[0]['batch']}, N {points[0]['N']}\n\n"
    header = [f"{first}: {told}" for told in ("µs per token", "peak memory, MiB", "share of the limit")]
    return text + table(["L", *names, *header], rows)


def _share(point: dict, name: str) -> str:
    return f"{point['share_of_limit'][name]:.1%}"


def milliseconds(point: dict, names: list[str]) -> list[str]:
    """Return the cells of these names, empty for what was spared."""
    times = [point["median_seconds"].get(name) for name in names]
    return ["" if time is None else f"{1000 * time:,.1f}" for time in times]


def time_header(first: str) -> list[str]:
    """Return the header of `time_cells`."""
    return ["ms", *[f"× {name}" for name in dict.fromkeys([first, "torch"])], SHARE]


def time_cells(point: dict, name: str) -> list[str]:
    """Return time, its ratio to the first and to the scan in PyTorch, and the share of the limit of that name."""
    ratios = [show(point["ratio_quartiles"][name])]
    if next(iter(point["median_seconds"])) != "torch":
        ratios.append(show(point["ratio_to_torch_quartiles"][name]))
    return [f"{1000 * point['median_seconds'][name]:,.1f}", *ratios, _share(point, name)]
