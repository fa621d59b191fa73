"""This module makes the tables and figures of the studies of Mamba, from the JSONs of their runs alone."""

import math
import statistics
from pathlib import Path

import torch
from benchmarks.measuring import table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reduction_results import doubling_ticks

from hf_compressm.plotting import save_figure
from hf_compressm.storage.files import write_aside
from hf_compressm.theory.rankings import rank_correlation

from .arms import as_long_as, cut_at, from_scratch, refitted, throughout
from .running import by_arm

Arms = dict[str, list[dict]]  # arm → its results, a seed each
MEASURES = (("accuracy", 100, "accuracy, %"), ("loss", 1, "loss, nats"))
SCRATCH = -12  # where models from scratch stand on an axis of cuts in % of the steps
BEFORE_COMPARISON = ("difficulty", "rate")  # how the arms of the runs begin that only prepare the comparison


def report(root: Path, results: list[dict]) -> None:
    """Print the tables, and put them and the figures beside the runs."""
    arms = by_arm(results)
    compared = {arm: results for arm, results in arms.items() if not arm.startswith(BEFORE_COMPARISON)}
    sizes = sizes_in(arms)
    sections = [preparation(arms, kind, sizes) for kind in BEFORE_COMPARISON]
    full = compared.get(throughout(sizes[0]))
    if full:
        sections += [comparison(compared, full), stability(full)]
        save_figure(figure_of_moments(compared, sizes), root / "moments.png")
        save_figure(figure_of_time(compared, sizes), root / "time.png")
        save_figure(figure_of_stability(full), root / "stability.png")
        save_figure(figure_of_spectra(compared, sizes), root / "spectra.png")
    text = "\n".join(section for section in sections if section)
    write_aside(root / "tables.md", lambda path: path.write_text(text))
    print(text)
    print(", ".join(str(file) for file in sorted([*root.glob("*.png"), *root.glob("*.md")])))


def sizes_in(arms: Arms) -> tuple[int, ...]:
    """Return the sizes that models were built with, descending: the full one first."""
    built = {result["settings"]["recipe"]["state_size"] for results in arms.values() for result in results}
    return tuple(sorted(built, reverse=True))


def preparation(arms: Arms, kind: str, sizes: tuple[int, ...]) -> str:
    """Return the table of difficulties or learning rates by size, a row each; empty where nothing was tried."""
    tried = list(dict.fromkeys(arm.rpartition(", N = ")[0] for arm in arms if arm.startswith(kind)))
    rows = []
    for name in sorted(tried, key=lambda name: [float(word) if is_number(word) else 0 for word in name.split()]):
        of_sizes = (arms.get(f"{name}, N = {size}", []) for size in sizes)
        told = ["; ".join(f"{percent(r['accuracy'])} ({r['loss']:.3f})" for r in found) or "–" for found in of_sizes]
        rows.append([name.removeprefix(kind), *told])
    header = [kind, *(f"N = {size}: accuracy, % (loss, nats)" for size in sizes)]
    return table(header, rows) if rows else ""


def comparison(arms: Arms, full: list[dict]) -> str:
    """Return the table of all arms: results, times relative to the full N, and what a cut cost at once.

    An arm is compared with that from scratch of its size, seed by seed: with the same seed, and as many steps, they
    see the same data.
    """
    recalls = "recall_accuracy" in full[0]
    clock = clock_of(arms)
    whole = statistics.mean(seconds_of(result, clock) for result in full)
    name, scale, label = chief_measure(arms)
    header = ["arm", "N", "steps", "time", "accuracy, %", "loss, nats", f"{label}: more than from scratch"]
    header += ["rise at the cut, nats", "seeds"]
    header += ["recall loss, nats"] * recalls
    rows = []
    for arm, results in sorted(arms.items(), key=lambda entry: mean(entry[1], "loss")):
        rises = [sum(cut["rise"] for cut in r["cuts"]) for r in results if r["cuts"]]
        rows.append(
            [
                arm,
                f"{statistics.mean(statistics.mean(result['state_sizes']) for result in results):.3g}",
                str(round(statistics.mean(map(steps_of, results)))),
                f"{statistics.mean(seconds_of(result, clock) for result in results) / whole:.2f}",
                spread([100 * result["accuracy"] for result in results], 1),
                spread([result["loss"] for result in results], 3),
                spread([scale * each for each in differences(results, arms, name)], 1 if scale > 1 else 3, "+"),
                spread(rises, 3),
                str(len(results)),
            ]
            + ([spread([result["recall_loss"] for result in results], 2)] if recalls else [])
        )
    return table(header, rows)


def differences(results: list[dict], arms: Arms, name: str) -> list[float]:
    """Return by seed a measure less that of the model as small from the start, where that is another arm."""
    size = {size for result in results for size in result["state_sizes"]}
    scratch = arms.get(from_scratch(size.pop()), []) if len(size) == 1 else []
    of_seed = {result["seed"]: result[name] for result in scratch if scratch is not results}
    return [result[name] - of_seed[result["seed"]] for result in results if result["seed"] in of_seed]


def stability(full: list[dict]) -> str:
    """Return the table of how uncut models' rankings at a time correlate with those at the end of training."""
    moments = stability_of(full)
    rows = [
        [f"{(place + 1) / len(moments):.0%}", *(f"{number:.2f}" for number in moment)]
        for place, moment in enumerate(moments)
    ]
    header = ["of the steps", "Kendall's τ_b with the end, mean", "lowest layer or seed", "of two draws at that time"]
    return table(header, rows)


def stability_of(full: list[dict]) -> list[tuple[float, float, float]]:
    """Return by observation, over layers and seeds, mean and least τ_b with the last, and mean τ_b of two draws."""
    moments = []
    for place in range(min(len(result["curve"]) for result in full)):
        correlations = [
            rank_correlation(torch.tensor(then), torch.tensor(last))
            for result in full
            for then, last in zip(result["curve"][place]["scores"], result["curve"][-1]["scores"], strict=True)
        ]
        noise = statistics.mean(statistics.mean(result["curve"][place]["rank_noise"]) for result in full)
        moments.append((statistics.mean(correlations), min(correlations), noise))
    return moments


def figure_of_moments(arms: Arms, sizes: tuple[int, ...]) -> Figure:
    """Draw results against the moment of the cut, from scratch to never, by size, and against the size at the end."""
    full, name, scale, label = sizes[0], *chief_measure(arms)
    figure = Figure(figsize=(9.6, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, size in enumerate(sizes[1:]):
        found = {SCRATCH: arms.get(from_scratch(size)), 100: arms[throughout(full)]}
        found |= {at: arms.get(cut_at(at / 100, full, size)) for at in (10, 25, 50, 80)}
        found = {at: [scale * result[name] for result in found[at]] for at in sorted(found) if found[at]}
        left.plot(list(found), list(map(statistics.mean, found.values())), color=f"C{i}", label=f"{full} → {size}")
        for at, values in found.items():
            left.plot([at] * len(values), values, "o", color=f"C{i}", markersize=4, alpha=0.6)
        refits = {at: arms.get(refitted(cut_at(at / 100, full, size))) for at in (25, 50)}
        refits = {at: statistics.mean(scale * result[name] for result in each) for at, each in refits.items() if each}
        left.plot(list(refits), list(refits.values()), f"C{i}D--", markersize=4, label=f"{full} → {size}, refitted")
    left.set_xticks([SCRATCH, 10, 25, 50, 80, 100], ["scratch", "10", "25", "50", "80", "never"], fontsize=8)
    left.set(xlabel="cut after this share of the steps, %", ylabel=label)
    left.legend(frameon=False, fontsize=8)
    ways = ["throughout", "from scratch", "at 10 %", "at 25 %", "at 50 %", "at 80 %", "when settled"]
    for i, way in enumerate(ways):
        shown = [arm for arm in arms if arm.endswith(way) and "grown" not in arm and "as long as" not in arm]
        runs = [result for arm in shown for result in arms[arm]]
        if not runs:
            continue
        places = [statistics.mean(run["state_sizes"]) * 2 ** ((i - 3) / 12) for run in runs]
        right.plot(places, [scale * run[name] for run in runs], "osD^vP*"[i], color=f"C{i}", markersize=5, label=way)
    doubling_ticks(right, [1, *reversed(sizes)])
    right.set(xlabel="state size N at the end (points of one size side by side)")
    right.legend(frameon=False, fontsize=7)
    return figure


def clock_of(arms: Arms) -> dict[str, float]:
    """Return size → seconds of a step, the median over all runs; other work on the machine disturbs single ones."""
    times: dict[str, list[float]] = {}
    for results in arms.values():
        for result in results:
            for size, seconds in result["seconds_per_step"].items():
                times.setdefault(size, []).append(seconds)
    return {size: statistics.median(seconds) for size, seconds in times.items()}


def seconds_of(result: dict, clock: dict[str, float], end: int | None = None) -> float:
    """Return the time of a run up to a step, or of all of it: its steps at each size by the clock, and the cuts."""
    end = steps_of(result) if end is None else end
    cutting = result["cutting_seconds"] if any(cut["step"] <= end for cut in result["cuts"]) else 0.0
    return cutting + sum(steps * clock[str(size)] for size, steps in steps_at_sizes(result, end) if steps)


def steps_at_sizes(result: dict, end: int) -> list[tuple[int, int]]:
    """Return (size, steps) of a run up to a step, for each size that it has had, in turn."""
    recipe = result["settings"]["recipe"]
    changes = [
        (0, recipe["projected"][0] if recipe.get("projected") else recipe["state_size"]),
        *((cut["step"], max(cut["state_sizes"])) for cut in result["cuts"]),
    ]
    changes += [(growth["step"], growth["state_size"]) for growth in result.get("growths", [])]
    ends = [min(step, end) for step, _ in changes[1:]] + [end]
    return [(size, max(0, last - first)) for (first, size), last in zip(changes, ends, strict=True)]


def steps_of(result: dict) -> int:
    """Return the number of steps of the whole run."""
    return result["settings"]["recipe"]["steps"]


def chief_measure(arms: Arms) -> tuple[str, float, str]:
    """Return (name, scale, label): accuracy where all answers are asked for, otherwise the loss."""
    is_text = any("recall_loss" in result for results in arms.values() for result in results)
    return MEASURES[1 if is_text else 0]


def figure_of_time(arms: Arms, sizes: tuple[int, ...]) -> Figure:
    """Draw the loss along the time of training, of the smallest size, and where runs that last as long end."""
    full, small = sizes[0], sizes[-1]
    cuts = [cut_at(end, full, small) for end in (0.1, 0.5, 0.8)]
    shown = [throughout(full), from_scratch(small), *cuts]
    shown += [as_long_as(arm, cut_at(0.5, full, small)) for arm in (from_scratch(small), throughout(full))]
    figure = Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained")
    clock = clock_of(arms)
    for axes, (name, scale, label) in zip(figure.subplots(1, 2), MEASURES, strict=True):
        for i, arm in enumerate(arm for arm in shown if arm in arms):
            places = range(min(len(result["curve"]) for result in arms[arm]))
            seconds = [statistics.mean(seconds_of(r, clock, r["curve"][p]["step"]) for r in arms[arm]) for p in places]
            values = [statistics.mean(scale * r["curve"][place][name] for r in arms[arm]) for place in places]
            style = {"linestyle": "--"} if "as long" in arm else {}
            axes.plot(seconds, values, marker="o", markersize=3, color=f"C{i}", label=arm, **style)
        axes.set(xlabel="training time, s", ylabel=label)
    told = axes.get_legend_handles_labels()
    figure.legend(*told, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return figure


def figure_of_stability(full: list[dict]) -> Figure:
    """Draw how the ranking at each time agrees with that at the end, over layers and seeds, and how two draws do."""
    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axes, moments = figure.subplots(), stability_of(full)
    times = [100 * (place + 1) / len(moments) for place in range(len(moments))]
    means, lowest, noise = zip(*moments, strict=True)
    axes.plot(times, means, "o-", markersize=4, label="with the end of training, mean")
    axes.plot(times, lowest, "C0:", label="the layer or seed with the lowest")
    axes.plot(times, noise, "C1--", label="two calibration draws at that time")
    axes.set(xlabel="of the training steps, %", ylabel="Kendall's $\\tau_b$ of the states", ylim=(None, 1.02))
    axes.legend(frameon=False, fontsize=8)
    return figure


def figure_of_spectra(arms: Arms, sizes: tuple[int, ...]) -> Figure:
    """Draw the σ of the first layer's surrogate along the first seed's training, with and without cuts."""
    full, small = sizes[0], sizes[-1]
    shown = [throughout(full), *(cut_at(end, full, small) for end in (0.1, 0.5)), from_scratch(small)]
    shown = [arm for arm in shown if arm in arms]
    figure = Figure(figsize=(2.6 * len(shown), 3.4), dpi=130, layout="constrained")
    for axes, arm in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        curve, cuts, layer = arms[arm][0]["curve"], arms[arm][0]["cuts"], arms[arm][0]["layers"][0]
        for rank in range(full):
            points = [(p["step"], p["hankel_singular_values"][0]) for p in curve]
            points = [(step, sigma[rank]) for step, sigma in points if rank < len(sigma)]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"{0.75 * rank / full:.2f}", linewidth=0.8)
        for cut in cuts:
            axes.axvline(cut["step"], color="C1", linestyle="--", linewidth=1)
        axes.set_yscale("log")
        axes.set_title(arm, fontsize=8)
        axes.set_xlabel("step")
    figure.axes[0].set_ylabel(f"Hankel singular values of layer {layer}")
    floor_at(figure.axes, 1e-8)
    return figure


def floor_at(panels: list[Axes], share: float) -> None:
    """Cut off what is below this share of the largest value: round-off."""
    top, bottom = max(axes.dataLim.y1 for axes in panels), min(axes.dataLim.y0 for axes in panels)
    panels[0].set_ylim(max(share * top, bottom / 2), 2 * top)


def mean(results: list[dict], name: str) -> float:
    """Return the mean over the seeds."""
    return statistics.mean(result[name] for result in results)


def deviation(values: list[float]) -> float:
    """Return the standard deviation; NaN for a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Return mean ± standard deviation; empty where there are no values."""
    if not values:
        return ""
    told = f"{statistics.mean(values):{sign}.{digits}f}"
    return told if len(values) < 2 else f"{told} ± {deviation(values):.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def is_number(word: str) -> bool:
    """Say whether a word can be sorted as a number."""
    return word.replace(".", "", 1).replace("e-", "", 1).isdigit()
