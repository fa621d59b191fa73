"""Pictures of the singular values, of a run, and of results: `pip install hf_compressm[plot]`.

Every function returns a matplotlib `Figure`, which `save_figure` writes. No pyplot: no global state, no backend.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, cycle
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .hankel import truncation_rank
from .history import History, write_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Spectra = dict[int, Tensor] | Sequence[Tensor]  # layer → spectrum, (N,), descending; or one for each layer
FLOOR = 1e-10  # as a share of σ_1; what lies below is round-off
LEGEND_LAYERS = 8  # more layers than this get a colour bar
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX*"
AUXILIARY = {"color": "0.35", "linestyle": "--", "linewidth": 0.8, "zorder": 0}
SMALL = 8  # points, of text beside the axes


def plot_spectra(spectra: Spectra) -> "Figure":
    """Hankel singular values of every layer, σ_i / σ_1 on a logarithmic axis; what is below 1e-10 is shown there.

    Args:
        spectra: layer → spectrum, (N,), descending, as in `StateReport.hankel_singular_values`; or one for each layer.
    """
    spectra, (figure, axes) = _by_layer(spectra), _panels()
    _draw_layers(axes, {i: (sigma / sigma[0].clamp_min(1e-300)).clamp_min(FLOOR) for i, sigma in spectra.items()})
    axes.set(yscale="log", xlabel="rank $i$", ylabel=r"Hankel singular value $\sigma_i\,/\,\sigma_1$")
    return figure


def plot_trajectories(history: History, layer: int = 0) -> "Figure":
    """One layer through training: above its singular values, below how far they moved between observations.

    A line follows σ_i, by its rank i, and ends at the cut that removes it; dots are the spectra that events measured.
    Movement and Weyl's bound are in % of σ_1, with gaps where two observations cannot be compared.

    Args:
        history: of a run with observations.
        layer: which layer, from 0.

    Raises:
        ValueError: there are no observations, or no such layer.
    """
    if not history.observations:
        raise ValueError("the history holds no observations: train with CompreSSMSchedule(monitor_steps=...).")
    layers = len(history.observations[0].state_sizes)
    if not 0 <= layer < layers:
        raise ValueError(f"layer = {layer}; allowed: 0 … {layers - 1}.")
    history = replace(history, events=[event for event in history.events if event.step is not None])
    figure, (above, below) = _panels(5, nrows=2, sharex=True, height_ratios=[5, 3])
    _draw_singular_values(above, history, layer)
    _draw_movement(below, history, layer)
    _mark_cuts(above, below, history, layer)
    return figure


def plot_kept_energy(spectra: Spectra, tolerances: Sequence[float] = (0.1, 0.05, 0.01)) -> "Figure":
    """Share of Σσ that the first r singular values hold, in %; dots at the rank that each tolerance τ gives a layer.

    Args:
        spectra: as for `plot_spectra`.
        tolerances: shares that may be discarded, in (0, 1). The axis begins at five times the largest below 100 %.
    """
    spectra, (figure, axes) = _by_layer(spectra), _panels()
    kept = {i: 100 * sigma.cumsum(0) / sigma.sum().clamp_min(1e-300) for i, sigma in spectra.items()}
    for line, (i, sigma) in zip(_draw_layers(axes, kept), spectra.items(), strict=True):
        ranks = [truncation_rank(sigma, tolerance, min_reduction=0) for tolerance in tolerances]
        shares = [kept[i][rank - 1] for rank in ranks]
        axes.plot(ranks, shares, "o", color=line.get_color(), markersize=5.5, markeredgecolor="white")
    for tolerance in tolerances:
        share = 100 * (1 - tolerance)
        axes.axhline(share, **AUXILIARY)
        text = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": SMALL}
        axes.annotate(rf"$\tau$ = {tolerance:g}", (1, share), xytext=(3, 0), va="center", **text)
    axes.set(xlabel="rank $r$", ylabel=r"share of $\Sigma\sigma$ kept (%)")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 100 * (1 - 5 * max(tolerances, default=1))))
    return figure


def plot_accuracy(results: list[dict]) -> "Figure":
    """Accuracy against final state size, one series per arm: the mean over seeds, bars of one standard deviation.

    Args:
        results: dicts of `arm` (str), `state_size` (float) and `accuracy` (fractions, one per seed).
    """
    if not results:
        raise ValueError("there are no results to plot.")
    figure, axes = _panels()
    arms = dict.fromkeys(result["arm"] for result in results)
    results = sorted(results, key=itemgetter("state_size"))
    for i, (arm, color, marker) in enumerate(zip(arms, cycle(COLORS), cycle(MARKERS), strict=False)):
        series = [result for result in results if result["arm"] == arm]
        accuracies = [[100 * accuracy for accuracy in result["accuracy"]] for result in series]
        spreads = [stdev(seeds) if len(seeds) > 1 else math.nan for seeds in accuracies]
        style = {"color": color, "marker": marker, "linestyle": "-" if len(series) > 1 else "none", "label": arm}
        sizes = [result["state_size"] for result in series]
        aside = 2 ** ((i - (len(arms) - 1) / 2) / 24)  # arms of one size stand side by side on the logarithmic axis
        style["transform"] = _matplotlib().transforms.Affine2D().scale(aside, 1) + axes.transData
        axes.errorbar(sizes, [mean(seeds) for seeds in accuracies], spreads, capsize=2.5, markersize=5, **style)
    axes.set(xlabel="final state size $N$", ylabel="accuracy (%)", ylim=(None, min(axes.get_ylim()[1], 101)))
    _size_ticks(axes, [result["state_size"] for result in results])
    axes.legend(frameon=False)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure in the format of the path's ending, aside first and then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:]))


def _matplotlib():
    """The package, with the modules that are used here."""
    try:
        import matplotlib.cm
        import matplotlib.figure
        import matplotlib.transforms
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install hf_compressm[plot].") from error
    return matplotlib


def _panels(height: float = 4, **options) -> tuple:
    """A figure 6.4 inches wide, and what its `subplots` gives."""
    figure = _matplotlib().figure.Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    panels = figure.subplots(**options)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(_whole_numbers())
    return figure, panels


def _by_layer(spectra: Spectra) -> dict[int, Tensor]:
    """Layer → spectrum, float64 on the CPU, (N,)."""
    spectra = spectra if isinstance(spectra, dict) else dict(enumerate(spectra))
    if not spectra:
        raise ValueError("there are no spectra to plot.")
    return {index: sigma.detach().to("cpu", torch.float64) for index, sigma in spectra.items()}


def _draw_layers(axes: "Axes", curves: dict[int, Tensor]) -> list:
    """A line for each layer over the ranks 1 … N, coloured along depth, and what tells the layers apart."""
    colors = _color_scale(min(curves), max(curves))
    for index, curve in curves.items():
        style = {"color": colors.to_rgba(index), "marker": "." if len(curve) <= 16 else ""}
        axes.plot(range(1, len(curve) + 1), curve, linewidth=1.3, label=f"layer {index}", **style)
    if len(curves) > LEGEND_LAYERS:
        _color_bar(axes, colors, "layer")
    else:
        axes.legend(frameon=False)
    return list(axes.lines)


def _draw_singular_values(axes: "Axes", history: History, layer: int) -> None:
    """A line per rank through all spectra; at the step of an event its own, from before the cut."""
    records = chain(history.observations, history.events)
    spectra = {record.step: record.hankel_singular_values[layer].tolist() for record in records}
    largest = max(map(len, spectra.values()))
    colors = _color_scale(1, largest)
    for i in range(largest):
        steps = sorted(step for step, sigma in spectra.items() if i < len(sigma))
        style = {"color": colors.to_rgba(i + 1), "marker": "." if len(steps) == 1 else ""}
        axes.plot(steps, [spectra[step][i] for step in steps], linewidth=0.7, **style)
    for step in history.steps:
        ranks = range(1, len(spectra[step]) + 1)
        axes.scatter([step] * len(ranks), spectra[step], s=4, c=colors.to_rgba(ranks), zorder=3)
    axes.set(yscale="log", ylabel=r"singular value $\sigma_i$")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR * axes.get_ylim()[1]))
    if largest > 1:
        _color_bar(axes, colors, "rank $i$")


def _draw_movement(axes: "Axes", history: History, layer: int) -> None:
    """Both in % of σ_1, over the step of the later of the two observations compared; NaN makes the gaps."""
    distances = {"Weyl's bound": ("weyl_bound", COLORS[1], "s"), "largest movement": ("movement", COLORS[0], "o")}
    steps = [observation.step for observation in history.observations]
    for label, (name, color, marker) in distances.items():
        given = [(observation, getattr(observation, name)) for observation in history.observations]
        shares = [math.nan if moved is None else 100 * seen.share(moved)[layer] for seen, moved in given]
        if not all(map(math.isnan, shares)):
            axes.plot(steps, shares, color=color, marker=marker, markersize=3.5, linewidth=1.3, label=label)
    axes.set(xlabel="optimizer step", ylabel=r"change (% of $\sigma_1$)")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no comparable observations", ha="center", backgroundcolor="w", transform=axes.transAxes)


def _mark_cuts(above: "Axes", below: "Axes", history: History, layer: int) -> None:
    """Dashed lines at the steps where this layer lost states, with N before and after at their top."""
    for event in history.events:
        before, after = event.state_sizes_before[layer], event.state_sizes_after[layer]
        if after < before:
            for axes in (above, below):
                axes.axvline(event.step, **AUXILIARY)
            text = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": SMALL}
            above.annotate(f"N {before} → {after}", (event.step, 1), xytext=(0, 3), ha="center", rotation=90, **text)


def _color_scale(smallest: int, largest: int) -> "ScalarMappable":
    """Viridis without its pale end, which is hard to see on white."""
    mpl = _matplotlib()
    colors = mpl.colors.ListedColormap(mpl.colormaps["viridis"](range(230)))
    return mpl.cm.ScalarMappable(mpl.colors.Normalize(smallest, max(largest, smallest + 1)), colors)


def _color_bar(axes: "Axes", colors: "ScalarMappable", label: str) -> None:
    axes.figure.colorbar(colors, ax=axes, label=label, ticks=_whole_numbers()).outline.set_visible(False)


def _whole_numbers():
    return _matplotlib().ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _size_ticks(axes: "Axes", sizes: list[float]) -> None:
    """A logarithmic axis with ticks at these sizes, ascending, numbered where there is room, powers of two first."""
    room, labelled = math.log2(sizes[-1] / sizes[0]) / 12, []
    for size in sorted(sizes, key=lambda size: (math.log2(size) % 1 > 0, size)):
        if all(abs(math.log2(size / other)) > room for other in labelled):
            labelled.append(size)
    axes.set_xscale("log", base=2)
    axes.set_xticks(labelled, [f"{round(size, 1):g}" for size in labelled])
    axes.set_xticks(sizes, [""] * len(sizes), minor=True)
