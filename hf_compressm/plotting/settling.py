"""When the rankings of states settled: their movement through training beside the noise of the calibration data."""

import math
from typing import TYPE_CHECKING

from ..storage.history import History
from ..storage.records import Observation
from .figures import AUXILIARY, COLORS, SMALL, new_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {  # of an observation: the movement, the noise, what the axis says
    "rank_correlation": ("rank_noise", r"Kendall's $\tau_b$"),
    "share_distance": ("share_noise", "distance of score shares"),
}


def plot_settling(history: History, layer: int | None = None) -> "Figure":
    """Rank correlation of the states with an earlier point of training, beside that of two calibration draws.

    A panel for each layer. Dots are filled where the layer stood still: where neither the order nor the score shares
    moved further than the noise. Dashes stand where the layer was cut, with the reason. Of a single layer the distance
    of its score shares is shown as well, below.

    Args:
        history: of a run with the trigger "settled".
        layer: which layer, from 0; None for all.

    Raises:
        ValueError: no rankings were compared, or there is no such layer.
    """
    seen = [observation for observation in history.observations if observation.rank_noise is not None]
    if not seen:
        raise ValueError(
            "the history holds no comparison of rankings: train with CompreSSMSchedule(trigger='settled')."
        )
    layers = len(seen[0].state_sizes)
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"layer = {layer}; allowed: 0 … {layers - 1}, or None for all.")
    return _draw_layers(history, seen, layers) if layer is None else _draw_layer(history, seen, layer)


def _draw_layers(history: History, seen: list[Observation], layers: int) -> "Figure":
    columns = math.ceil(math.sqrt(layers)) if layers < 16 else 4
    rows = math.ceil(layers / columns)
    figure, panels = new_figure(1.3 + 1.9 * rows, nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False)
    panels = list(panels.flat)
    for index, axes in enumerate(panels[:layers]):
        _draw(axes, seen, index, "rank_correlation")
        _mark_cuts(axes, history, index)
        axes.set_title(f"layer {index}", fontsize=SMALL, loc="left")
        axes.xaxis.set_major_locator(whole_numbers(4 if columns > 1 else 10))
    for axes in panels[layers:]:
        axes.set_visible(False)
    for axes in panels[layers - columns : layers]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize="medium")
    figure.supylabel(MEASURES["rank_correlation"][1], fontsize="medium")
    _name_lines(figure, panels[:layers])
    return figure


def _draw_layer(history: History, seen: list[Observation], layer: int) -> "Figure":
    figure, panels = new_figure(5, nrows=2, sharex=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        _draw(axes, seen, layer, measure)
        axes.set_ylabel(MEASURES[measure][1])
    _mark_cuts(panels[0], history, layer)
    _mark_cuts(panels[1], history, layer, with_reason=False)
    panels[0].set_title(f"layer {layer}", fontsize=SMALL, loc="left")
    panels[1].set_xlabel("optimizer step")
    panels[1].set_ylim(bottom=0)
    _name_lines(figure, panels)
    return figure


def _draw(axes: "Axes", seen: list[Observation], layer: int, measure: str) -> None:
    noise = {point.step: getattr(point, MEASURES[measure][0])[layer] for point in seen}
    axes.plot(*_points(noise), color=COLORS[1], linewidth=1.3, label="two calibration draws")
    compared = [point for point in seen if point.settled_points is not None]
    moved = {point.step: getattr(point, measure)[layer] for point in compared}
    still = {point.step: moved[point.step] for point in compared if point.settled_points[layer]}
    style = {"color": COLORS[0], "marker": "o", "markersize": 3.5, "markerfacecolor": "w", "linewidth": 1}
    axes.plot(*_points(moved), label="now and earlier, one draw", **style)
    style = {"color": COLORS[0], "marker": "o", "markersize": 3.5, "linestyle": "none", "zorder": 3}
    axes.plot(*_points(still), label="within the noise", **style)


def _points(values: dict[int, float | None]) -> tuple[list[int], list[float]]:
    """NaN makes the gaps, where a layer was cut in between."""
    return list(values), [math.nan if value is None else value for value in values.values()]


def _mark_cuts(axes: "Axes", history: History, layer: int, with_reason: bool = True) -> None:
    for event in history.events:
        reason = event.reasons[layer] if event.reasons else None
        if reason is not None:
            axes.axvline(event.step, **AUXILIARY)
            if with_reason:
                where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
                undone = ", undone" if event.rolled_back_at is not None else ""
                text = f"{reason}{undone}"
                axes.annotate(text, (event.step, 0), xytext=(-3, 3), ha="right", rotation=90, fontsize=SMALL, **where)


def _name_lines(figure: "Figure", panels: list["Axes"]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    style = {"loc": "outside upper center", "frameon": False, "fontsize": SMALL, "ncols": len(labels)}
    figure.legend(handles, labels, **style)
