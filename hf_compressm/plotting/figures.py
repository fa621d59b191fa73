"""All figures share these colours, panels, ticks, legends and notes, and the way in which they are written."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from ..storage.files import write_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

FLOOR = 1e-10  # as a share of σ_1; what lies below is round-off
LEGEND_LAYERS = 8  # more layers than this get a colour bar
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX*"
AUXILIARY = {"color": "0.35", "linestyle": "--", "linewidth": 0.8, "zorder": 0}
SMALL = 8  # points, of text beside the axes
NOTE_WIDTH = 0.03  # of an upright note above the axes, as a share of their width


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure in the format of the path's ending, to a file aside that is then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:]))


def load_matplotlib():
    """Return the package matplotlib, with the modules that are used here.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib.cm
        import matplotlib.figure
        import matplotlib.patheffects
        import matplotlib.transforms
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib.") from error
    return matplotlib


def new_figure(height: float = 4, **options) -> tuple:
    """Return a figure 6.4 inches wide, and what its `subplots` gives."""
    figure = load_matplotlib().figure.Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    panels = figure.subplots(**options)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(whole_numbers())
    return figure, panels


def color_scale(smallest: int, largest: int) -> "ScalarMappable":
    """Return viridis over [smallest, largest], without its pale end, which is hard to see on white."""
    mpl = load_matplotlib()
    colors = mpl.colors.ListedColormap(mpl.colormaps["viridis"](range(230)))
    return mpl.cm.ScalarMappable(mpl.colors.Normalize(smallest, max(largest, smallest + 1)), colors)


def color_bar(axes: "Axes", colors: "ScalarMappable", label: str, **options) -> None:
    """Draw a colour bar without a frame beside the axes, with ticks at whole numbers by default."""
    options = {"ticks": whole_numbers()} | options
    bar = axes.figure.colorbar(colors, ax=axes, label=label, **options)
    bar.outline.set_visible(False)
    bar.minorticks_off()


def tell_layers_apart(axes: "Axes", colors: "ScalarMappable", layers: int) -> None:
    """Draw a legend of the labelled lines, or with many layers a colour bar."""
    if layers > LEGEND_LAYERS:
        color_bar(axes, colors, "layer")
    else:
        axes.legend(frameon=False)


def check_layer(layer: int, layers: Sequence[int], otherwise: str = "") -> None:
    """Refuse the index of a layer that has no state.

    Raises:
        ValueError: the index is not one of `layers`; the message names them.
    """
    if layer not in layers:
        raise ValueError(f"layer = {layer}; allowed: {', '.join(map(str, layers))}{otherwise}.")


def whole_numbers(intervals: int = 10):
    """Return a locator of ticks for layers, ranks and steps, with at most so many intervals."""
    return load_matplotlib().ticker.MaxNLocator(intervals, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def size_ticks(axes: "Axes", sizes: Sequence[float], axis: str = "x") -> None:
    """Make an axis logarithmic, with ticks at these sizes, numbered where there is space, powers of two first."""
    sizes = sorted(sizes)
    gap, labelled = math.log2(sizes[-1] / sizes[0]) / 12, []
    for size in sorted(sizes, key=lambda size: (math.log2(size) % 1 > 0, size)):
        if all(abs(math.log2(size / other)) > gap for other in labelled):
            labelled.append(size)
    getattr(axes, f"set_{axis}scale")("log", base=2)
    set_ticks = getattr(axes, f"set_{axis}ticks")
    set_ticks(labelled, [f"{round(size, 1):g}" for size in labelled])
    set_ticks(sizes, [""] * len(sizes), minor=True)


def size_change(before: Sequence[int], after: Sequence[int]) -> str:
    """Return N before and after as words; its mean over layers where they differ."""
    name = "N" if len(set(before)) == len(set(after)) == 1 else "mean N"
    before, after = (f"{round(mean(sizes), 1):g}" for sizes in (before, after))
    return f"{name} {before} → {after}"


def write_above(axes: "Axes", notes: Sequence[tuple[float, str, str]]) -> None:
    """Write upright notes above the axes, each at its x; those too close move apart, with a line to that x.

    Call it when all data are drawn. Of more notes than fit it writes every second, or third, and so on.

    Args:
        notes: (x, text, colour).
    """
    left, right = axes.get_xlim()
    notes = sorted(notes)[:: max(1, math.ceil(NOTE_WIDTH * len(notes)))]
    places = _apart([(x - left) / (right - left) for x, _, _ in notes], NOTE_WIDTH)
    for (x, text, color), place in zip(notes, places, strict=True):
        moved = abs(place - (x - left) / (right - left)) > 1e-9
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0.5, 0)}
        axes.annotate(
            text,
            (x, 1),
            (place, 1.05 if moved else 1.02),
            xycoords=axes.get_xaxis_transform(),
            textcoords="axes fraction",
            arrowprops=line if moved else None,
            color=color,
            fontsize=SMALL,
            ha="center",
            va="bottom",
            rotation=90,
        )


def _apart(places: list[float], gap: float) -> list[float]:
    """Move ascending places in [0, 1] at least `gap` apart; those that were close stay centred where they were."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _spread(groups[-1], gap)[0] < _spread(groups[-2], gap)[-1] + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [place for group in groups for place in _spread(group, gap)]


def _spread(group: list[float], gap: float) -> list[float]:
    """Return places `gap` apart around the mean of the group, within [0, 1]."""
    width = gap * (len(group) - 1)
    first = min(max(sum(group) / len(group) - width / 2, 0), 1 - width)
    return [first + gap * i for i in range(len(group))]
