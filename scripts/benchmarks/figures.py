"""The picture of a benchmark shows the scan by N and by L, the training step, and generation."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(results: dict) -> Figure:
    """Draw what was measured, in five panels."""
    panels = []
    if "scan" in results:
        panels += [
            lambda axes: _draw_scan(axes, results["scan"]["by_state_size"], "N", "state size N"),
            lambda axes: _draw_scan(axes, results["scan"]["by_length"], "L", "sequence length L"),
        ]
    if "training" in results:
        panels.append(lambda axes: _draw_step(axes, results["training"]["cut"]))
    if "decoding" in results:
        panels.append(lambda axes: _draw_decoding(axes, results["decoding"]))
    if "mamba2" in results:
        panels.append(lambda axes: _draw_mamba2(axes, results["mamba2"]["scan"]))
    figure = Figure(figsize=(4.6 * len(panels), 3.8), dpi=130, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
    return figure


def _draw_scan(axes: Axes, points: list[dict], axis: str, label: str) -> None:
    for name in points[0]["median_seconds"]:
        found = [point for point in points if name in point["median_seconds"]]
        times = [1000 * point["median_seconds"][name] for point in found]
        axes.loglog([point[axis] for point in found], times, "o-", markersize=4, label=name)
    limits = [1000 * point["limit_seconds"] for point in points]
    axes.loglog([point[axis] for point in points], limits, "--", color="grey", label="limit of the machine")
    axes.set_xticks([point[axis] for point in points], [str(point[axis]) for point in points])
    axes.minorticks_off()
    held = f"L {points[0]['L']}" if axis == "N" else f"N {points[0]['N']}"
    axes.set_title(f"scan, forward and backward (batch {points[0]['batch']}, {held})", fontsize=9)
    axes.set_xlabel(label)
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8)


def _draw_step(axes: Axes, cut: dict) -> None:
    before, after = cut["sizes"]
    labels = {"uncut": f"N = {before}", "cut": f"cut\n{before} → {after}", "built": f"built\nat {after}"}
    speeds = [cut["tokens_per_second"][name] for name in labels]
    bars = axes.bar(list(labels.values()), speeds, color=["C7", "C0", "C2"], width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_title("training", fontsize=9)
    axes.set_ylabel("tokens per second")


def _draw_decoding(axes: Axes, points: list[dict]) -> None:
    for batch, style in zip(sorted({point["batch"] for point in points}), ("o-", "s-"), strict=False):
        found = [point for point in points if point["batch"] == batch]
        sizes = [point["state_size"] for point in found]
        for name, colour in (("hf_compressm", "C0"), ("Transformers", "C7")):
            speeds = [point["tokens_per_second"][name] for point in found]
            axes.plot(sizes, speeds, style, color=colour, markersize=4, label=f"{name}, batch {batch}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_title("generation", fontsize=9)
    axes.set_xlabel("state size N")
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False, fontsize=8)


def _draw_mamba2(axes: Axes, points: list[dict]) -> None:
    names, sizes = list(points[0]["median_seconds"]), [point["N"] for point in points]
    for name in names:
        axes.loglog(sizes, [1000 * point["median_seconds"][name] for point in points], "o-", markersize=4, label=name)
    axes.loglog(sizes, [1000 * point["limit_seconds"] for point in points], "--", color="grey", label="limit")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_title("scan of Mamba-2, forward and backward", fontsize=9)
    axes.set_xlabel("state size N")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8)
