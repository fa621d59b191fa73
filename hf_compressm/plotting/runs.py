"""These pictures show what happened in a run: how N went down, and what the loss did."""

import math
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from statistics import mean
from typing import TYPE_CHECKING

from ..storage.history import History
from ..storage.records import ReductionEvent
from .figures import (
    AUXILIARY,
    COLORS,
    LEGEND_LAYERS,
    color_scale,
    new_figure,
    size_change,
    size_ticks,
    tell_layers_apart,
    write_above,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SINGLE_LAYERS = 32  # more layers than this are drawn as their mean and range
STEEP_START = 0.02  # of the run: losses that may lie above the axis
TAIL = 0.05  # of the run: how far a line goes on after what changed at its end


def plot_state_sizes(history: History, max_steps: int | None = None) -> "Figure":
    """Draw N through training on a logarithmic axis, with rollbacks, and at the end what was cut after training.

    There is one line where all layers have one size; else there is a line for each layer, coloured along depth, or
    with more than 32 layers their mean and range.

    Args:
        history: the history of a run.
        max_steps: the number of optimizer steps of the whole run; by default the lines end at the last known step.

    Raises:
        ValueError: there is no step of training, or there are some above `max_steps`.
    """
    known = _known_steps(history)
    if not known:
        raise ValueError("the history holds no event or observation in training: train with a CompreSSMCallback.")
    end = max(known) if max_steps is None else max_steps
    if end < max(known):
        raise ValueError(f"max_steps = {max_steps}; the history goes on to step {max(known)}.")
    figure, axes = new_figure()
    _draw_sizes(axes, *_sizes_over_steps(history, end))
    axes.set(xlabel="optimizer step", ylabel="state size $N$")
    write_above(axes, _mark_rollbacks(axes, history) + _mark_after_training(axes, history, end))
    return figure


def plot_loss(log_history: Sequence[dict], history: History) -> "Figure":
    """Draw the loss through training, with cuts (N before → after) and rollbacks; what a rollback undid is shaded.

    The axis ends at the highest loss after the first 2 % of the steps, or after the first cut if that is earlier.

    Args:
        log_history: `trainer.state.log_history`: dicts with `step` and `loss` or `eval_loss`, in nats per prediction.
        history: the history of the same run.

    Raises:
        ValueError: the log holds no loss.
    """
    training, evaluations = (_logged(log_history, name) for name in ("loss", "eval_loss"))
    if not training and not evaluations:
        seen = sorted({name for entry in log_history for name in entry})
        raise ValueError(
            f"the log holds no loss and no eval_loss with a step, but {seen}; give trainer.state.log_history, with "
            "TrainingArguments(logging_steps=...)."
        )
    figure, axes = new_figure()
    if training:
        marker = "." if len(training) == 1 else ""
        axes.plot(*zip(*training, strict=True), color=COLORS[0], marker=marker, linewidth=1, label="training")
    if evaluations:
        style = {"marker": "o", "linestyle": "none", "markersize": 4, "zorder": 3}
        axes.plot(*zip(*evaluations, strict=True), color="black", label="evaluation", **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per prediction)")
    _leave_out_steep_start(axes, training + evaluations, history)
    write_above(axes, _mark_cuts(axes, history) + _mark_rollbacks(axes, history))
    axes.legend(frameon=False, loc="upper right")
    return figure


def _known_steps(history: History) -> list[int]:
    """Return the steps of all that happened in training."""
    happened = [record.step for record in [*history.events, *history.observations]]
    return [step for step in [*happened, *_rollbacks(history)] if step is not None]


def _rollbacks(history: History) -> dict[int, ReductionEvent]:
    """Return the step of each rollback → the earliest of the cuts that it undid."""
    return {event.rolled_back_at: event for event in reversed(history.events) if event.rolled_back_at is not None}


def _sizes_over_steps(history: History, end: int) -> tuple[list[float], dict[int, list[int]]]:
    """Return steps, (T,), and by layer index N from each step on, (T,); the lines end at the last step."""
    first = history.events[0].state_sizes_before if history.events else history.observations[0].state_sizes
    cuts = [(event.step, event.state_sizes_after) for event in history.events if event.step is not None]
    rollbacks = [(step, event.state_sizes_before) for step, event in _rollbacks(history).items()]
    changes = [(0, first), *sorted(cuts + rollbacks, key=itemgetter(0))]  # at one step, the cut came before
    changes += _after_training(history, end)
    last, sizes = changes[-1]
    changes.append((end if last < end else last + TAIL * end, sizes))
    steps, sizes = zip(*changes, strict=True)
    of_layers = map(list, zip(*sizes, strict=True))
    return list(steps), dict(zip(history.layers, of_layers, strict=True))


def _after_training(history: History, end: int) -> list[tuple[float, list[int]]]:
    """Return the sizes after each cut that came after training, at places beyond its end."""
    sizes = [event.state_sizes_after for event in history.events if event.step is None]
    return [(end * (1 + TAIL * i), after) for i, after in enumerate(sizes, 1)]


def _draw_sizes(axes: "Axes", steps: list[float], sizes: dict[int, list[int]]) -> None:
    """Draw N over the steps, (T,), of layers given by index, (T,) each."""
    draw = partial(axes.plot, steps, drawstyle="steps-post")
    first, *others = sizes.values()
    uniform = all(other == first for other in others)
    if uniform:
        draw(first, color=COLORS[0], linewidth=2)
    elif len(sizes) <= SINGLE_LAYERS:
        colors = color_scale(min(sizes), max(sizes))
        halo = 2.4 if len(sizes) <= LEGEND_LAYERS else 0  # a line under others still shows then
        for drawn, (layer, line) in enumerate(sizes.items(), 1):
            width = 1.2 + halo * (1 - drawn / len(sizes))
            draw(line, color=colors.to_rgba(layer), linewidth=width, label=f"layer {layer}")
        tell_layers_apart(axes, colors, len(sizes))
    else:
        of_steps = list(zip(*sizes.values(), strict=True))
        smallest, largest = list(map(min, of_steps)), list(map(max, of_steps))
        band = {"step": "post", "alpha": 0.25, "linewidth": 0, "label": "range over layers"}
        axes.fill_between(steps, smallest, largest, color=COLORS[0], **band)
        draw(list(map(mean, of_steps)), color=COLORS[0], linewidth=2, label="mean over layers")
        axes.legend(frameon=False)
    different = sorted(set().union(*sizes.values()))
    powers = [2**k for k in range(different[-1].bit_length()) if 2**k >= different[0]]
    size_ticks(axes, different if uniform or len(powers) < 3 else powers, "y")


def _logged(log_history: Sequence[dict], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of the entries that hold the value."""
    return [(entry["step"], float(entry[name])) for entry in log_history if {"step", name} <= entry.keys()]


def _leave_out_steep_start(axes: "Axes", losses: list[tuple[int, float]], history: History) -> None:
    """End the axis at the highest loss after the first steps, or after the first cut, so that cuts can be seen."""
    start = min([STEEP_START * max(losses)[0], *(event.step for event in _cuts(history))])
    highest = max((loss for step, loss in losses if step >= start and math.isfinite(loss)), default=math.inf)
    if any(loss > highest for _, loss in losses):
        axes.set_ylim(top=highest + 0.05 * (highest - axes.get_ylim()[0]))


def _cuts(history: History) -> list[ReductionEvent]:
    """Return the cuts that were made in training."""
    return [event for event in history.events if event.is_cut and event.step is not None]


def _mark_cuts(axes: "Axes", history: History) -> list[tuple[int, str, str]]:
    """Draw dashed lines at the cuts, and return the notes that belong above them."""
    cuts = _cuts(history)
    for event in cuts:
        axes.axvline(event.step, **AUXILIARY)
    return [(e.step, size_change(e.state_sizes_before, e.state_sizes_after), AUXILIARY["color"]) for e in cuts]


def _mark_rollbacks(axes: "Axes", history: History) -> list[tuple[int, str, str]]:
    """Draw dotted lines at the rollbacks and shade the steps that they undid; return the notes above the lines."""
    rollbacks = _rollbacks(history)
    for step, event in rollbacks.items():
        axes.axvspan(event.step, step, color=COLORS[1], alpha=0.15, linewidth=0, zorder=0)
        axes.axvline(step, color=COLORS[1], linestyle=":", linewidth=1.3, zorder=0)
    return [(step, "rollback", COLORS[1]) for step in rollbacks]


def _mark_after_training(axes: "Axes", history: History, end: int) -> list[tuple[float, str, str]]:
    """Draw dashed lines at the cuts after training, and return the notes that belong above them."""
    cuts = _after_training(history, end)
    for place, _ in cuts:
        axes.axvline(place, **AUXILIARY)
    return [(place, "after training", AUXILIARY["color"]) for place, _ in cuts]
