"""This picture shows when rankings settled: their movement in training beside the noise of the calibration data."""

import math
from typing import TYPE_CHECKING

from ..storage.history import History
from ..storage.records import Observation
from .figures import AUXILIARY, COLORS, SMALL, check_layer, new_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {  # of an observation: the movement, the noise, what the axis says
    "rank_correlation": ("rank_noise", r"Kendall's $\tau_b$"),
    "share_distance": ("share_noise", "distance of score shares"),
}


def plot_settling(history: History, layer: int | None = None) -> "Figure":
    """Draw how the states rank beside an earlier point of training, and beside another calibration draw.

    There is a panel with the rank correlations for each layer that has a state. Dots are filled where the layer stood
    still: where neither the order nor the score shares moved further than the noise. Dashes stand where the layer was
    cut, with the reason. Of a single layer the distance of its score shares is shown as well, below.

    Args:
        history: the history of a run with the trigger "settled".
        layer: the index of a layer that has a state; None for all of them.

    Raises:
        ValueError: no rankings were compared, or the layer has no state.
    """
    seen = [observation for observation in history.observations if observation.rank_noise is not None]
    if not seen:
        raise ValueError(
            "the history holds no comparison of rankings: train with CompreSSMSchedule(trigger='settled')."
        )
    if layer is None:
        return _draw_layers(history, seen)
    check_layer(layer, history.layers, otherwise=", or None for all")
    return _draw_layer(history, seen, layer)


def _draw_layers(history: History, seen: list[Observation]) -> "Figure":
    count = len(history.layers)
    columns = math.ceil(math.sqrt(count)) if count < 16 else 4
    rows = math.ceil(count / columns)
    figure, panels = new_figure(1.3 + 1.9 * rows, nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False)
    panels = list(panels.flat)
    for layer, axes in zip(history.layers, panels, strict=False):
        _draw(axes, seen, layer, "rank_correlation")
        _mark_cuts(axes, history, layer)
        axes.set_title(f"layer {layer}", fontsize=SMALL, loc="left")
        axes.xaxis.set_major_locator(whole_numbers(4 if columns > 1 else 10))
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[count - columns : count]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize="medium")
    figure.supylabel(MEASURES["rank_correlation"][1], fontsize="medium")
    _name_lines(figure, panels[:count])
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
    noise = {point.step: point.by_layer(MEASURES[measure][0])[layer] for point in seen}
    axes.plot(*_points(noise), color=COLORS[1], linewidth=1.3, label="two calibration draws")
    compared = [point for point in seen if point.settled_points is not None]
    moved = {point.step: point.by_layer(measure)[layer] for point in compared}
    still = {point.step: moved[point.step] for point in compared if point.by_layer("settled_points")[layer]}
    style = {"color": COLORS[0], "marker": "o", "markersize": 3.5, "markerfacecolor": "w", "linewidth": 1}
    axes.plot(*_points(moved), label="now and earlier, one draw", **style)
    style = {"color": COLORS[0], "marker": "o", "markersize": 3.5, "linestyle": "none", "zorder": 3}
    axes.plot(*_points(still), label="within the noise", **style)


def _points(values: dict[int, float | None]) -> tuple[list[int], list[float]]:
    """Return steps and values; NaN makes gaps where a layer was cut in between."""
    return list(values), [math.nan if value is None else value for value in values.values()]


def _mark_cuts(axes: "Axes", history: History, layer: int, with_reason: bool = True) -> None:
    for event in history.events:
        reason = event.by_layer("reasons").get(layer)
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
