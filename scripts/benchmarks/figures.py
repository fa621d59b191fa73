"""The picture of a benchmark has a row for each family: its scan by N and by L, the training step, and generation."""

from collections.abc import Callable
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from .decoding import GENERATE, OURS
from .decoding import TRANSFORMERS as THEIRS
from .family import MAMBA_SSM, Family
from .mamba1_family import LOOP, MAMBAPY
from .mamba2_family import LITE, RECURRENCE, TRANSFORMERS
from .training import BUILT, UNCUT

COLOURS = {  # one for ours, on a CPU, on a GPU and in generation, which never meet in a panel; so of Transformers'
    **dict.fromkeys(("cpp", "triton", OURS), "C0"),
    **dict.fromkeys((TRANSFORMERS, LOOP, THEIRS), "C3"),
    "torch": "C1",
    MAMBAPY: "C2",
    MAMBA_SSM: "C6",
    LITE: "C4",
    RECURRENCE: "C5",
    GENERATE: "C9",
}
LIMIT = {"linestyle": "--", "color": "grey", "label": "limit of the machine"}


def draw(results: dict, families: list[Family]) -> Figure:
    """Draw what was measured of each family."""
    rows = {family.title: _panels(results[family.model_type]) for family in families}
    width = max(len(panels) for panels in rows.values())
    figure = Figure(figsize=(4.4 * width, 4.2 * len(rows)), dpi=130, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, hspace=0.04)[:, 0]
    for part, (title, panels) in zip(parts, rows.items(), strict=True):
        part.suptitle(title, fontweight="bold")
        all_axes = part.subplots(1, width, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=False):
            panel(axes)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        _one_legend(part)
    return figure


def _panels(results: dict) -> list[Callable[[Axes], None]]:
    panels = []
    if "scan" in results:
        panels.append(partial(_draw_scan, points=results["scan"]["by_state_size"], axis="N", label="state size N"))
        panels.append(partial(_draw_scan, points=results["scan"]["by_length"], axis="L", label="sequence length L"))
    if "training" in results:
        panels.append(partial(_draw_step, cut=results["training"]["cut"]))
    if "throughput" in results:
        panels.append(partial(_draw_throughput, speeds=results["throughput"]["tokens_per_second"]))
    if "decoding" in results:
        panels.append(partial(_draw_decoding, points=results["decoding"]))
    return panels


def _one_legend(part: SubFigure) -> None:
    """Tell each name once, below the panels of a family."""
    handles = {}
    for axes in part.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        part.legend(handles.values(), handles, loc="outside lower center", ncols=10, frameon=False, fontsize=9)


def _draw_scan(axes: Axes, points: list[dict], axis: str, label: str) -> None:
    for name in points[0]["median_seconds"]:
        found = [point for point in points if name in point["median_seconds"]]
        times = [1000 * point["median_seconds"][name] for point in found]
        places = [point[axis] for point in found]
        axes.loglog(places, times, "o-", markersize=4, color=COLOURS[name], label=name)
    limits = [1000 * point["limit_seconds"] for point in points]
    axes.loglog([point[axis] for point in points], limits, **LIMIT)
    axes.set_xticks([point[axis] for point in points], [str(point[axis]) for point in points])
    axes.minorticks_off()
    held = f"L {points[0]['L']}" if axis == "N" else f"N {points[0]['N']}"
    axes.set_title(f"scan, forward and backward (batch {points[0]['batch']}, {held})", fontsize=9)
    axes.set_xlabel(label)
    axes.set_ylabel("ms")


def _draw_step(axes: Axes, cut: dict) -> None:
    before, after = cut["sizes"]
    labels = {UNCUT: f"N = {before}"} | {basis: f"cut\n{before} → {after}\n{basis}" for basis in cut["bases"]}
    labels[BUILT] = f"built\nat {after}"
    speeds = [cut["tokens_per_second"][name] for name in labels]
    bars = axes.bar(list(labels.values()), speeds, color="0.7", width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.margins(y=0.1)
    axes.set_title("training", fontsize=9)
    axes.set_ylabel("tokens per second")


def _draw_throughput(axes: Axes, speeds: dict[str, float]) -> None:
    plain = {int(name): speed for name, speed in speeds.items() if name.isdecimal()}
    balanced = {int(name.split()[0]): speed for name, speed in speeds.items() if not name.isdecimal()}
    of_most = f"N balanced states of {max(plain)} features"
    for found, style, label in ((plain, "o-", "N states"), (balanced, "o:", of_most)):
        if found:
            axes.plot(found.keys(), found.values(), style, color=COLOURS[OURS], markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(plain), map(str, plain))
    axes.set_ylim(bottom=0)
    axes.set_title("training", fontsize=9)
    axes.set_xlabel("state size N")
    axes.set_ylabel("tokens per second")


def _draw_decoding(axes: Axes, points: list[dict]) -> None:
    batches = sorted({point["batch"] for point in points})
    for batch, style in zip(batches, ("o-", "s--", "^:"), strict=False):
        found = [point for point in points if point["batch"] == batch]
        sizes = [point["N"] for point in found]
        for name in found[0]["tokens_per_second"]:
            speeds = [point["tokens_per_second"][name] / batch for point in found]
            axes.plot(sizes, speeds, style, color=COLOURS[name], markersize=4, label=name)
        axes.plot([], [], style, color="black", markersize=4, label=f"batch {batch}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_title("generation", fontsize=9)
    axes.set_xlabel("state size N")
    axes.set_ylabel("tokens per second and sequence")
