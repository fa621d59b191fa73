"""This module makes the tables and figures of `compare_reductions.py` from its results, for each text and size."""

import math
import statistics
from collections.abc import Iterable

from benchmarks.measuring import mebibytes, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NOT_MEASURED = "–"
Groups = dict[str, list[dict]]  # "text, N = …" → the results of its models


def tables(name: str, group: list[dict]) -> str:
    """Return the tables of one text: rises by criterion and remedy, over calibration data, and what a remedy takes."""
    size, divisors, remedies = (
        group[0]["state_size"],
        named(group, "rises", "divisor"),
        named(group, "rises", "remedy"),
    )
    text = f"## {name}\n\nLoss {spread(result['loss'] for result in group)} nats on validation text. "
    over = f", mean ± standard deviation over {len(group)} seeds" if len(group) > 1 else " (one seed)"
    text += f"Rises in thousandths of a nat{over}.\n\n"
    rows = [
        [c, r, *(rise_of(group, "rises", criterion=c, remedy=r, divisor=d) for d in divisors)]
        for c in named(group, "rises", "criterion")
        for r in remedies
    ]
    rows = [row for row in rows if set(row[2:]) != {NOT_MEASURED}]
    text += table(["criterion", "remedy", *(f"{size} → {size // d}" for d in divisors)], rows)
    rows = [
        [r, *(rise_of(group, "rises", "recall", criterion="output", remedy=r, divisor=d) for d in divisors)]
        for r in remedies
    ]
    recall = spread(result["recall"] for result in group)
    text += f"\nThe same of the loss in recalling four random pairs ({recall} nats at {size}), by `output`\n\n"
    text += table(["remedy", *(f"{size} → {size // d}" for d in divisors)], rows)
    counts = named(group, "curve", "batches")
    rows = [[r, *(rise_of(group, "curve", remedy=r, batches=count) for count in counts)] for r in remedies]
    text += f"\n{size} → {size // 4} by `output`, by calibration batches of 1,024 tokens for each third\n\n"
    text += table(["remedy", *map(str, counts)], rows)
    rows = [[remedy, *costs(group, remedy)] for remedy in remedies]
    text += "\nOne analysis, on one thread\n\n" + table(["remedy", "seconds", "memory, MiB"], rows)
    text += f"\nPredicted against measured change of the loss: correlation {correlations(group)}.\n"
    if not group[0].get("output_errors"):
        return text
    return text + f"\nPredicted against measured error of a layer's output: {output_error_ratios(group)}.\n"


def named(group: list[dict], key: str, name: str) -> list:
    """Return what there is of a kind, in order."""
    return list(dict.fromkeys(entry[name] for entry in group[0][key]))


def values(group: list[dict], key: str, name: str = "rise", **wanted) -> list[float]:
    """Return what the models' entries that agree with `wanted` say, a number for each model."""
    return [e[name] for result in group for e in result[key] if all(e[k] == v for k, v in wanted.items())]


def rise_of(group: list[dict], key: str, name: str = "rise", **wanted) -> str:
    return spread(1000 * rise for rise in values(group, key, name, **wanted))


def spread(numbers: Iterable[float]) -> str:
    numbers = list(numbers)
    if not numbers:
        return NOT_MEASURED
    digits = 1 if abs(statistics.mean(numbers)) >= 10 else 2
    text = f"{statistics.mean(numbers):.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ± {statistics.stdev(numbers):.{digits}f}"


def costs(group: list[dict], remedy: str) -> list[str]:
    """Return the table of seconds and memory."""
    seconds = values(group, "rises", "seconds", criterion="output", remedy=remedy, divisor=4)
    peaks = [result["peak_bytes"][remedy] for result in group]
    return [
        f"{statistics.median(seconds):.1f}" if seconds else NOT_MEASURED,
        mebibytes(None if None in peaks else max(peaks)),
    ]


def points_of(group: list[dict], of_all_layers: bool) -> list[dict]:
    return [p for result in group for p in result["predictions"] if (p["layer"] is None) == of_all_layers]


def correlations(group: list[dict]) -> str:
    def correlation(points: list[dict], name: str) -> str:
        return f"{statistics.correlation([p[name] for p in points], [p['measured'] for p in points]):.3f}"

    alone, all_layers = (points_of(group, of_all) for of_all in (False, True))
    return (
        f"{correlation(alone, 'predicted')} of a layer alone, {correlation(all_layers, 'predicted')} of the sum over "
        f"layers, {correlation(all_layers, 'report')} of the loss that a report measures"
    )


def output_error_ratios(group: list[dict]) -> str:
    points = [point for result in group for point in result["output_errors"]]
    logs = [[math.log(point[name]) for point in points] for name in ("predicted", "measured")]
    ratios = sorted(predicted - measured for predicted, measured in zip(*logs, strict=True))
    middle, *ends = map(math.exp, (statistics.mean(ratios), ratios[0], ratios[-1]))
    return (
        f"ratio {middle:.2f} (geometric mean; {ends[0]:.2f} to {ends[1]:.2f}), correlation of the logarithms "
        f"{statistics.correlation(*logs):.4f}, {len(points)} layers and sizes"
    )


def figure_of_rises(groups: Groups) -> Figure:
    """Draw the rise against size, a panel per model and remedy, a line for each criterion."""
    first = next(iter(groups.values()))
    remedies, criteria = named(first, "rises", "remedy"), named(first, "rises", "criterion")
    figure = Figure(figsize=(4 * len(remedies), 3.8 * len(groups)), dpi=120, layout="constrained")
    panels = figure.subplots(len(groups), len(remedies), sharey="row", squeeze=False)
    for row, (name, group) in zip(panels, groups.items(), strict=True):
        sizes = {d: group[0]["state_size"] // d for d in named(group, "rises", "divisor")}
        for axes, remedy in zip(row, remedies, strict=True):
            for i, criterion in enumerate(criteria):
                chosen = {"criterion": criterion, "remedy": remedy}
                found = [values(group, "rises", **chosen, divisor=d) for d in sizes]
                if not all(found):
                    continue
                rises = list(map(statistics.mean, found))
                style = {"color": f"C{i}", "linewidth": 2.5 if criterion == "output" else 1.2}
                axes.plot(sizes.values(), rises, "o-", markersize=3, label=criterion, **style)
            doubling_ticks(axes, list(sizes.values()))
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_title(f"{name}: {remedy}", fontsize=9)
            axes.set_xlabel("states kept")
        row[0].set_ylabel("rise of the loss, nats")
    lines = panels[0, 0].get_legend_handles_labels()  # without a remedy every criterion is drawn
    figure.legend(*lines, loc="outside lower center", frameon=False, fontsize=7, ncols=len(criteria))
    return figure


def figure_of_curves(groups: Groups) -> Figure:
    """Draw the rise against the amount of calibration data, a panel per model."""
    figure = Figure(figsize=(4.6 * len(groups), 3.6), dpi=120, layout="constrained")
    for axes, (name, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        counts = named(group, "curve", "batches")
        for remedy in named(group, "curve", "remedy"):
            rises = [values(group, "curve", remedy=remedy, batches=count) for count in counts]
            axes.plot(counts, list(map(statistics.mean, rises)), "o-", markersize=4, label=remedy)
            axes.fill_between(counts, list(map(min, rises)), list(map(max, rises)), alpha=0.15)
        doubling_ticks(axes, counts)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{name} → {group[0]['state_size'] // 4}, by output", fontsize=9)
        axes.set_xlabel("calibration batches of 1,024 tokens, for each third")
        axes.set_ylabel("rise of the loss, nats")
        axes.legend(frameon=False, fontsize=8)
    return figure


def figure_of_predictions(groups: Groups) -> Figure:
    """Draw the change on validation text against that in the report, of layers alone and of all, a panel per model."""
    figure = Figure(figsize=(4.6 * len(groups), 4.2), dpi=120, layout="constrained")
    for axes, (name, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for label, of_all_layers in (("a layer alone", False), ("all layers", True)):
            points = points_of(group, of_all_layers)
            measured = [point["measured"] for point in points]
            axes.plot([point["predicted"] for point in points], measured, "o", markersize=4, alpha=0.7, label=label)
        axes.axline((0, 0), (0.1, 0.1), linestyle="--", color="grey", linewidth=1)
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("predicted change of the loss, nats")
        axes.set_ylabel("measured on validation text, nats")
        axes.legend(frameon=False, fontsize=8)
    return figure


def figure_of_output_errors(groups: Groups) -> Figure:
    """Draw the squared error of a layer's output against Σ σ_i² of the states that go, a panel per model."""
    figure = Figure(figsize=(4.6 * len(groups), 4.2), dpi=120, layout="constrained")
    for axes, (name, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        points = [point for result in group for point in result["output_errors"]]
        for i, layer in enumerate(named(group, "output_errors", "layer")):
            of_layer = [point for point in points if point["layer"] == layer]
            measured = [point["measured"] for point in of_layer]
            predicted = [point["predicted"] for point in of_layer]
            axes.loglog(predicted, measured, "o", color=f"C{i}", markersize=4, alpha=0.7, label=f"layer {layer}")
        ends = [min(point["measured"] for point in points), max(point["measured"] for point in points)]
        axes.plot(ends, ends, linestyle="--", color="grey", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("predicted, Σ σ² of the dropped states")
        axes.set_ylabel("squared error of the layer's output, validation text")
        axes.legend(frameon=False, fontsize=8)
    return figure


def doubling_ticks(axes: Axes, numbers: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, list(map(str, numbers)))
