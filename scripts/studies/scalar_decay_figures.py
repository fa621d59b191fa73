"""This module draws the figures of the studies of Mamba-2."""

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .arms import ABLE, cut_at, cut_when_able, projected, throughout
from .scalar_decay_readings import Arms, arms_that_end_at, best_from_scratch, effective_rank


def figure_of_curves(arms: Arms, large: int, sizes: Iterable[int]) -> Figure:
    """Draw the accuracy along training, the median over the seeds with quartiles, of the chief arms of each size."""
    sizes = list(sizes)
    figure = Figure(figsize=(1 + 3.8 * len(sizes), 4.4), dpi=130, layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True):
        shown = {
            throughout(large): throughout(large),
            best_from_scratch(arms, large, size): "r from scratch",
            projected(size, large, "balanced"): f"r projected from {large} at the start",
            cut_at(0.25, large, size): f"{large} → r at 25 %",
            cut_when_able(large, size): f"{large} → r at {100 * ABLE:.0f} % accuracy",
        }
        for i, (arm, label) in enumerate(shown.items()):
            if arm in arms:
                _draw_curve(axes, arms[arm], f"C{i}", label, "--" if i == 0 else "-")  # it is that of a cut until then
        axes.axhline(100 * ABLE, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="step", title=f"r = {size}")
    figure.axes[0].set_ylabel("accuracy, % (median and quartiles of the seeds)")
    told = figure.axes[0].get_legend_handles_labels()
    figure.legend(*told, loc="outside lower center", ncols=min(2 * len(sizes), 5), frameon=False, fontsize=8)
    return figure


def _draw_curve(axes: Axes, results: list[dict], colour: str, label: str, style: str) -> None:
    """Draw the last probe of each step, of the steps that all runs have."""
    curves = [{probe["step"]: 100 * probe["accuracy"] for probe in result["probes"]} for result in results]
    steps = sorted(set.intersection(*map(set, curves)))
    low, middle, high = np.quantile([[curve[step] for step in steps] for curve in curves], [0.25, 0.5, 0.75], axis=0)
    axes.plot(steps, middle, style, color=colour, label=label, linewidth=1.5, zorder=3 if style == "--" else 2)
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def figure_of_seeds(arms: Arms, large: int, sizes: Iterable[int], value: Callable, label: str) -> Figure:
    """Draw a value of every seed in a line for each arm, those of one size in a panel.

    Args:
        value: result → number; infinite ones are counted beside the line.
    """
    sizes = list(sizes)
    shown = {size: arms_that_end_at(arms, large, size) for size in sizes}
    heights = [len(of_size) + 2 for of_size in shown.values()]
    most = max(len(results) for results in arms.values())
    figure = Figure(figsize=(8, 1 + 0.24 * sum(heights)), dpi=130, layout="constrained")
    panels = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        values = {arm: [value(result) for result in arms[arm]] for arm in shown[size]}
        order = sorted(values, key=partial(_place, values, throughout(large)))
        for row, arm in enumerate(order):
            there_are = [each for each in values[arm] if math.isfinite(each)]
            axes.plot(there_are, [row] * len(there_are), "o", color="C0", markersize=4, alpha=0.5, markeredgewidth=0)
            for statistic, mark in ((statistics.median, "|"), (statistics.mean, "d")):
                if math.isfinite(middle := statistic(values[arm])):
                    style = {"markersize": 11, "markeredgewidth": 2} if mark == "|" else {"markersize": 5}
                    axes.plot([middle], [row], mark, color="C3", **style)
            if missing := len(values[arm]) - len(there_are):
                place = {"xy": (1.01, row), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
                axes.annotate(f"{missing} of {len(values[arm])} never", **place, fontsize=7, va="center", color="C3")
        seeds = {arm: "" if len(values[arm]) == most else f" ({len(values[arm])} seeds)" for arm in order}
        axes.set_yticks(range(len(order)), [arm + seeds[arm] for arm in order], fontsize=7)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
        axes.set_title(f"{large} → {size}", fontsize=9)
    panels[-1].set_xlabel(f"{label}\n(dots: seeds; bar: median; diamond: mean, where all have one)", fontsize=8)
    return figure


def _place(values: dict[str, list[float]], first: str, arm: str) -> tuple:
    """Return what arms are sorted by: how many seeds have no finite value, then the mean of the others."""
    there_are = [each for each in values[arm] if math.isfinite(each)]
    return arm != first, len(values[arm]) - len(there_are), statistics.mean(there_are or [0])


def figure_of_settling(results: list[dict], large: int, size: int) -> Figure:
    """Draw beside the accuracy of N throughout the effective rank and the overlap of subspaces, every seed.

    Args:
        size: r, the dimension of the subspaces.
    """
    figure = Figure(figsize=(12, 3.8), dpi=130, layout="constrained")
    figure.suptitle(f"N = {large} throughout, a line a seed", fontsize=9)
    left, middle, right = figure.subplots(1, 3)
    for result in results:
        left.plot(
            *zip(*((p["step"], 100 * p["accuracy"]) for p in result["probes"]), strict=True), "C0", linewidth=0.8
        )
        points = [(point["step"], effective_rank(point)) for point in result["curve"]]
        middle.plot(*zip(*points, strict=True), "C1", linewidth=0.8)
        for name, colour in (("with_end", "C2"), ("of_draws", "0.6")):
            points = [(point["step"], point[name]) for point in result.get("subspaces", [])]
            if points:
                right.plot(*zip(*points, strict=True), colour, linewidth=0.8)
    left.set(xlabel="step", ylabel="accuracy, %")
    middle.set(xlabel="step", ylabel="effective rank of σ², mean of the layers")
    right.plot([], [], "C2", label="with the end")
    right.plot([], [], "0.6", label="of two draws of data")
    right.axhline(size / large, color="C3", linestyle=":", linewidth=1, label="of random subspaces")
    right.legend(frameon=False, fontsize=8)
    right.set(xlabel="step", ylabel="overlap of the kept subspaces", ylim=(0, 1.03))
    return figure
