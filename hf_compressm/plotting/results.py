"""This picture shows what many runs came to."""

import math
from itertools import cycle
from operator import itemgetter
from statistics import mean, stdev
from typing import TYPE_CHECKING

from .figures import COLORS, MARKERS, load_matplotlib, new_figure, size_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_accuracy(results: list[dict]) -> "Figure":
    """Draw accuracy against final state size by arm: means over seeds with bars of one standard deviation.

    Args:
        results: dicts of `arm` (str), `state_size` (float) and `accuracy` (fractions, one per seed).

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("there are no results to plot.")
    figure, axes = new_figure()
    arms = dict.fromkeys(result["arm"] for result in results)
    results = sorted(results, key=itemgetter("state_size"))
    for i, (arm, color, marker) in enumerate(zip(arms, cycle(COLORS), cycle(MARKERS), strict=False)):
        series = [result for result in results if result["arm"] == arm]
        accuracies = [[100 * accuracy for accuracy in result["accuracy"]] for result in series]
        spreads = [stdev(seeds) if len(seeds) > 1 else math.nan for seeds in accuracies]
        label = arm.replace("$", r"\$")  # no mathematics: a name is shown as it is
        style = {"color": color, "marker": marker, "linestyle": "-" if len(series) > 1 else "none", "label": label}
        sizes = [result["state_size"] for result in series]
        aside = 2 ** ((i - (len(arms) - 1) / 2) / 24)  # arms of one size stand side by side on the logarithmic axis
        style["transform"] = load_matplotlib().transforms.Affine2D().scale(aside, 1) + axes.transData
        axes.errorbar(sizes, [mean(seeds) for seeds in accuracies], spreads, capsize=2.5, markersize=5, **style)
    axes.set(xlabel="final state size $N$", ylabel="accuracy (%)", ylim=(None, min(axes.get_ylim()[1], 101)))
    size_ticks(axes, [result["state_size"] for result in results])
    axes.legend(frameon=False)
    return figure
