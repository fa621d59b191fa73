"""These pictures show the singular values of a run: along its steps, and where it measured to cut."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..storage.history import History
from ..storage.records import ReductionEvent
from .figures import (
    AUXILIARY,
    COLORS,
    FLOOR,
    SMALL,
    check_layer,
    color_bar,
    color_scale,
    new_figure,
    size_change,
    whole_numbers,
)
from .spectra import ERROR_LABEL, add_error_axis, draw_error, error_shares, shares_of_largest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # of panels


def plot_trajectories(history: History, layer: int | None = None) -> "Figure":
    """Draw the singular values of a layer through training, and below them how far they moved.

    A line follows σ_i, by its rank i, and ends at the cut that removes it; dots are the spectra that events measured.
    Movement and Weyl's bound are in % of σ_1, with gaps where two observations cannot be compared.

    Args:
        history: the history of a run with observations.
        layer: the index of a layer that has a state; None for the first one.

    Raises:
        ValueError: there are no observations, or the layer has no state.
    """
    if not history.observations:
        raise ValueError("the history holds no observations: train with CompreSSMSchedule(monitor_steps=...).")
    layer = history.layers[0] if layer is None else layer
    check_layer(layer, history.layers)
    history = replace(history, events=[event for event in history.events if event.step is not None])
    figure, (above, below) = new_figure(5, nrows=2, sharex=True, height_ratios=[5, 3])
    _draw_singular_values(above, history, layer)
    _draw_movement(below, history, layer)
    _mark_cuts(above, below, history, layer)
    return figure


def plot_event_spectra(history: History) -> "Figure":
    """Draw the spectra that the events measured before their cuts, a panel each: σ_i / σ_1 over all layers.

    The line is the geometric mean, over the ranks that every layer has; the band reaches from the smallest to the
    largest over layers, and grey lines are the means of the other events. Dashes stand to the right of the states that
    are kept: of their mean number, where layers differ, with a bar at the bottom from the fewest to the most. What is
    below 1e-10 is shown there. Where the singular values predict the error of a cut, a second axis shows it for every
    rank, dashed: the geometric mean over layers of Σ_{i>r} σ_i² / Σ σ_i².

    Args:
        history: the history of a run, or of cuts after training.

    Raises:
        ValueError: there are no events with spectra.
    """
    events = [event for event in history.events if event.hankel_singular_values]
    if not events:
        raise ValueError("the history holds no spectra of events: train with a CompreSSMCallback, or compress.")
    columns = min(len(events), 2 if len(events) == 4 else COLUMNS)
    rows = math.ceil(len(events) / columns)
    grid = {"nrows": rows, "ncols": columns, "sharex": True, "sharey": True, "squeeze": False}
    figure, panels = new_figure(4 if rows == 1 and columns == 1 else 1.1 + 1.8 * rows, **grid)
    panels = list(panels.flat)
    colors = _step_colors(events)
    ranges = [_range_over_layers(event.hankel_singular_values) for event in events]
    for axes, event, color, measured in zip(panels, events, colors, ranges, strict=False):
        _draw_range(axes, *measured, color)
        _draw_others(axes, [other[1] for other in ranges if other is not measured])
        _mark_sizes_kept(axes, event)
        axes.set_title(_title(event), fontsize=SMALL, loc="left")
    _finish_grid(figure, panels, len(events), columns, _draw_errors(panels, events, colors, columns))
    return figure


def _draw_singular_values(axes: "Axes", history: History, layer: int) -> None:
    """Draw a line per rank through all spectra; an event's own spectrum is that from before its cut."""
    records = chain(history.observations, history.events)
    spectra = {record.step: record.by_layer("hankel_singular_values")[layer].tolist() for record in records}
    largest = max(map(len, spectra.values()))
    colors = color_scale(1, largest)
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
        color_bar(axes, colors, "rank $i$")


def _draw_movement(axes: "Axes", history: History, layer: int) -> None:
    """Draw movement and Weyl's bound in % of σ_1 at the later of the two observations compared; NaN makes gaps."""
    distances = {"Weyl's bound": ("weyl_bound", COLORS[1], "s"), "largest movement": ("movement", COLORS[0], "o")}
    steps = [observation.step for observation in history.observations]
    for label, (name, color, marker) in distances.items():
        shares = [100 * seen.share(name).get(layer, math.nan) for seen in history.observations]
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
    """Draw dashed lines at the steps where this layer lost states, with N before and after at their top."""
    for event in history.events:
        before, after = (event.by_layer(f"state_sizes_{when}")[layer] for when in ("before", "after"))
        if after < before:
            for axes in (above, below):
                axes.axvline(event.step, **AUXILIARY)
            text = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": SMALL}
            above.annotate(f"N {before} → {after}", (event.step, 1), xytext=(0, 3), ha="center", rotation=90, **text)


def _step_colors(events: Sequence[ReductionEvent]) -> list:
    """Return colours from dark to light along the steps of training, and one of its own for what came after."""
    steps = [event.step for event in events if event.step is not None] or [0]
    scale = color_scale(min(steps), max(steps))
    return [COLORS[1] if event.step is None else scale.to_rgba(event.step) for event in events]


def _range_over_layers(spectra: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest, (N,), geometric mean, (r,), and largest, (N,), σ_i / σ_1; all layers have a rank r.

    Beyond r a mean would rise wherever a layer with small values ends.
    """
    shares = [shares_of_largest(sigma.double()) for sigma in spectra]
    logarithms = pad_sequence(shares, padding_value=torch.nan).log()  # (N, layers)
    smallest, largest = logarithms.nan_to_num(nan=torch.inf).amin(1), logarithms.nan_to_num(nan=-torch.inf).amax(1)
    return smallest.exp(), logarithms[: min(map(len, spectra))].mean(1).exp(), largest.exp()


def _draw_range(axes: "Axes", smallest: Tensor, middle: Tensor, largest: Tensor, color) -> None:
    style = {"linewidth": 1.8, "marker": "." if len(middle) == 1 else "", "label": "mean over layers"}
    axes.plot(range(1, len(middle) + 1), middle, color=color, **style)
    band = {"color": color, "alpha": 0.25, "linewidth": 0, "label": "range over layers"}
    axes.fill_between(range(1, len(smallest) + 1), smallest, largest, **band)


def _draw_errors(panels: list["Axes"], events: Sequence[ReductionEvent], colors: list, columns: int) -> list["Axes"]:
    """Draw predicted errors in the panels of the events that have them, on second axes, which are returned."""
    drawn = []
    for i, (axes, event, color) in enumerate(zip(panels, events, colors, strict=False)):
        spectra = [sigma.double() for sigma in event.hankel_singular_values if len(sigma) > 1]
        if event.predicted_error is not None and spectra:
            errors = add_error_axis(axes)
            shares = [error_shares(sigma)[: min(map(len, spectra)) - 1] for sigma in spectra]
            draw_error(errors, torch.stack(shares).log().mean(0).exp(), color)
            is_last = i % columns == columns - 1 or i == len(events) - 1
            errors.tick_params(labelright=is_last)
            errors.set_ylabel(ERROR_LABEL if is_last else "", fontsize=SMALL)
            drawn.append(errors)
    limits = [errors.get_ylim() for errors in drawn]
    for errors in drawn:
        errors.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return drawn


def _draw_others(axes: "Axes", means: Sequence[Tensor]) -> None:
    for middle in means:
        style = {"color": "0.6", "linewidth": 0.6, "zorder": 1.5, "label": "other events"}
        axes.plot(range(1, len(middle) + 1), middle, **style)


def _mark_sizes_kept(axes: "Axes", event: ReductionEvent) -> None:
    if event.is_cut:
        kept = event.state_sizes_after
        axes.axvline(mean(kept) + 0.5, **(AUXILIARY | {"zorder": 2}), label="cut")
        if len(set(kept)) > 1:
            bar = {"transform": axes.get_xaxis_transform(), "solid_capstyle": "butt", "label": "range of cuts"}
            axes.plot([min(kept) + 0.5, max(kept) + 0.5], [0.02, 0.02], color="0.35", linewidth=3, **bar)


def _title(event: ReductionEvent) -> str:
    """Return when an event was, what became of N (its mean where layers differ), and whether that lasted."""
    when = "after training" if event.step is None else f"step {event.step}"
    undone = f", undone at {event.rolled_back_at}" if event.is_cut and event.rolled_back_at is not None else ""
    change = size_change(event.state_sizes_before, event.state_sizes_after)
    return f"{when}{undone}\n{change if event.is_cut else 'not cut'}"


def _finish_grid(figure: "Figure", panels: list["Axes"], used: int, columns: int, second: Sequence["Axes"]) -> None:
    """Name the axes once, number ranks below the lowest panel of every column, and draw one legend for all."""
    for axes in panels[used:]:
        axes.set_visible(False)
    for axes in panels[used - columns : used]:
        axes.tick_params(labelbottom=True)
    panels[0].set_yscale("log")
    panels[0].xaxis.set_major_locator(whole_numbers(4 if columns > 1 else 10))
    figure.supxlabel("rank $i$", fontsize="medium")
    figure.supylabel(r"Hankel singular value $\sigma_i\,/\,\sigma_1$", fontsize="medium")
    named = {
        label: handle
        for axes in [*reversed(panels), *second]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style = {"loc": "outside upper center", "frameon": False, "fontsize": SMALL}
    figure.legend(named.values(), named.keys(), ncols=len(named) if len(named) < 5 else 3, **style)
