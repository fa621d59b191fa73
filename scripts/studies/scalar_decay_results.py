"""This module makes the tables and figures of the studies of Mamba-2, from the JSONs of their runs alone."""

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.measuring import table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_compressm.plotting import save_figure
from hf_compressm.storage.files import write_aside

from .arms import ABLE, cut_at, cut_when_able, from_scratch, projected, started_as, then_reduced, throughout
from .language_results import BEFORE_COMPARISON, spread, steps_at_sizes
from .running import by_arm
from .training import effective_number

Arms = dict[str, list[dict]]  # arm → its results, a seed each
PUBLISHED = {128: 65, 64: 100, 32: 150, 16: 195}  # thousand tokens/s on an H100 by N, state-spaces/mamba #479
RESAMPLES = 10_000


def first_able(probes: list[dict], size: int | None = None) -> int | None:
    """Return the first step at which a model of this size, of any for None, was right in 90 % of the cases."""
    return next((p["step"] for p in probes if p["accuracy"] >= ABLE and size in (None, p["state_size"])), None)


def merit(result: dict) -> tuple[float, float]:
    """Return what starts are compared by, less is better: the step at which a run became able, then its loss."""
    step = first_able(result["probes"])
    return math.inf if step is None else step, result["loss"]


def report(root: Path, results: list[dict]) -> None:
    """Print the tables, and put them and the figures beside the runs."""
    arms = by_arm(results)
    compared = {arm: of_arm for arm, of_arm in arms.items() if not arm.startswith(BEFORE_COMPARISON)}
    sections = [tuning(arms), difficulties(arms)]
    large = max(recipe_of(of_arm[0])["state_size"] for of_arm in arms.values())
    full = throughout(large)
    if full in compared:
        sizes = sorted({end_size(of_arm[0]) for of_arm in compared.values()} - {large}, reverse=True)
        compare, is_text = (comparison_of_text, True) if "recall_loss" in compared[full][0] else (comparison, False)
        sections += [compare(compared, large, size) for size in sizes]
        sections += [cuts(compared), reduced(compared.get(then_reduced(large), [])), subspaces(compared[full])]
        if is_text:
            ends = figure_of_seeds(compared, large, sizes, lambda r: r["loss"], "loss at the end, nats")
        else:
            save_figure(figure_of_curves(compared, large, sizes), root / "curves.png")
            steps = f"step at which a model of the final size passed {ABLE:.0%}"
            save_figure(figure_of_seeds(compared, large, sizes, step_or_never, steps), root / "steps.png")
            percent = "accuracy at the end, %"
            ends = figure_of_seeds(compared, large, sizes, lambda r: 100 * r["accuracy"], percent)
        save_figure(ends, root / "ends.png")
        save_figure(figure_of_settling(compared[full], large, sizes[len(sizes) // 2]), root / "settling.png")
    text = "\n".join(section for section in sections if section)
    write_aside(root / "tables.md", lambda path: path.write_text(text))
    print(text)


def end_size(result: dict) -> int:
    """Return N at the end of a run."""
    return max(result["state_sizes"])


def tuning(arms: Arms) -> str:
    """Tell what each start of the grid led to."""
    runs = [result for arm, (result, *_) in arms.items() if arm.startswith("rate")]
    if not runs:
        return ""
    rows, starts = {}, sorted({(r["learning_rate"], r.get("map_scale", 1.0)) for r in map(recipe_of, runs)})
    for run in runs:
        recipe = recipe_of(run)
        able = first_able(run["probes"])
        row = (recipe["state_size"], bool(recipe.get("projected")), end_size(run))
        told = f"{run['accuracy']:.1%}" + (f" ({able})" if able else "")
        if "recall_loss" in run:
            told = f"{run['loss']:.3f}"
        rows.setdefault(row, {})[recipe["learning_rate"], recipe.get("map_scale", 1.0)] = merit(run), told
    lines = []
    for (size, is_projected, end), cells in sorted(rows.items(), reverse=True):
        best = min(cells, key=cells.get)
        told = [f"**{cells[s][1]}**" if s == best else cells[s][1] if s in cells else "" for s in starts]
        lines.append([f"{end} projected from {size}" if is_projected else f"N = {size}", *told])
    header = ["", *(f"{rate:g}, × {scale:g}" for rate, scale in starts)]
    task = task_of(runs[0])
    text = f"## Learning rate, and scale of the initial B and C ({task}; one seed)\n\n"
    text += "The loss" if "recall_loss" in runs[0] else "Accuracy at the end, and the step at which it passed 90 %"
    return text + "; in bold what each size is trained with.\n\n" + table(header, lines)


def difficulties(arms: Arms) -> str:
    """Tell how each size does at each difficulty."""
    runs = {arm: results[0] for arm, results in arms.items() if arm.startswith("difficulty")}
    if not runs:
        return ""
    tasks = list(dict.fromkeys(map(task_of, runs.values())))
    sizes = sorted({end_size(run) for run in runs.values()}, reverse=True)
    cells = {(task_of(run), end_size(run)): f"{run['accuracy']:.1%}" for run in runs.values()}
    rows = [[task, *(cells.get((task, size), "") for size in sizes)] for task in tasks]
    return "## Difficulty (one seed)\n\n" + table(["", *(f"N = {size}" for size in sizes)], rows)


def comparison(arms: Arms, large: int, size: int) -> str:
    """Tell what every arm that ends at this size came to, beside N throughout."""
    full, scratch = throughout(large), best_from_scratch(arms, large, size)
    control = projected(size, large, "balanced")
    rows = []
    for arm in arms_that_end_at(arms, large, size):
        results = arms[arm]
        steps = [step_or_never(result) for result in results]
        prices = [price(result, step, large) for result, step in zip(results, steps, strict=True)]
        rows.append(
            [
                arm,
                str(len(results)),
                with_interval([100 * r["accuracy"] for r in results], statistics.mean, 1),
                f"{sum(map(math.isfinite, steps))}",
                with_interval(steps, statistics.median, 0),
                with_interval(prices, statistics.median, 0),
                paired(results, arms.get(scratch, []), "accuracy", 100, 1),
                paired(results, arms.get(control, []), "accuracy", 100, 1),
            ]
        )
    header = ["arm", "seeds", "accuracy at the end, %", f"seeds that passed {ABLE:.0%}", "median step", "median price"]
    header += [f"more than {scratch}", f"more than {control}"]
    text = f"## {large} → {size} ({task_of(arms[full][0])})\n\n"
    text += f"With bootstrap intervals of 95 % over the seeds. A step counts at which a model of {size} states passed "
    text += f"{ABLE:.0%}; for {full}, one of {large}. A price is in steps of N = {large}, by the published "
    text += "throughputs of an H100. Differences are in points, by seed, ± one standard deviation; in brackets in "
    text += "how many seeds an arm is better.\n\n"
    return text + table(header, rows)


def arms_that_end_at(arms: Arms, large: int, size: int) -> list[str]:
    """Return N throughout, then the arms that are as small at the end: from scratch, projected, cut."""
    found = [arm for arm, results in arms.items() if end_size(results[0]) == size]
    return [throughout(large), *sorted(found, key=lambda arm: ("→" in arm, "projected" in arm))]


def best_from_scratch(arms: Arms, large: int, size: int) -> str:
    """Return which start served the small size better with all seeds, where there are two."""
    there_are = [arm for arm in (from_scratch(size), started_as(size, large)) if arm in arms]
    return max(there_are, key=lambda arm: statistics.mean(result["accuracy"] for result in arms[arm]))


def comparison_of_text(arms: Arms, large: int, size: int) -> str:
    """Tell what every arm of a language model that ends at this size came to, and what it recalls of random tokens."""
    full, scratch, control = throughout(large), from_scratch(size), projected(size, large, "balanced")
    rows = []
    for arm in arms_that_end_at(arms, large, size):
        results = arms[arm]
        rows.append(
            [
                arm,
                str(len(results)),
                f"{statistics.mean(recipe_of(result)['steps'] for result in results):.0f}",
                with_interval([result["loss"] for result in results], statistics.mean, 3),
                with_interval([result["recall_loss"] for result in results], statistics.mean, 2),
                paired(results, arms.get(scratch, []), "loss", -1, 4),
                paired(results, arms.get(control, []), "loss", -1, 4),
            ]
        )
    header = ["arm", "seeds", "steps", "loss, nats", "loss of recall, nats"]
    header += [f"less loss than {scratch}", f"less loss than {control}"]
    text = f"## {large} → {size} ({task_of(arms[full][0])})\n\n"
    text += "Loss on validation text, and at the values of random pairs of tokens that were just read; with bootstrap "
    text += "intervals of 95 % over the seeds. Differences are by seed, ± one standard deviation; in brackets in how "
    text += "many seeds an arm is better.\n\n"
    return text + table(header, rows)


def step_or_never(result: dict) -> float:
    """Return the first step at which the model was as small as at the end, and able; ∞ if there is none."""
    step = first_able(result["probes"], end_size(result))
    return math.inf if step is None else step


def throughput(size: int) -> float:
    """Return the published throughput at N, or at the next size that is known."""
    return PUBLISHED[min(known for known in PUBLISHED if known >= size)]


def price(result: dict, end: float, large: int) -> float:
    """Return what the steps up to one cost, in steps at N = `large`."""
    if math.isinf(end):
        return end
    return sum(steps * throughput(large) / throughput(size) for size, steps in steps_at_sizes(result, end))


def with_interval(values: list[float], statistic: Callable, digits: int) -> str:
    """Return a statistic with its bootstrap interval of 95 %; infinite ones are said to be beyond the run."""
    if not values:
        return ""
    generator = np.random.default_rng(0)
    drawn = generator.choice(np.array(values, dtype=float), (RESAMPLES, len(values)))
    resampled = np.sort(np.median(drawn, 1) if statistic is statistics.median else drawn.mean(1))
    low, high = resampled[round(0.025 * RESAMPLES)], resampled[round(0.975 * RESAMPLES) - 1]
    middle, low, high = ("never" if math.isinf(v) else f"{v:.{digits}f}" for v in (statistic(values), low, high))
    return f"{middle} [{low}, {high}]"


def paired(results: list[dict], others: list[dict], name: str, scale: float, digits: int) -> str:
    """Return the mean difference of a number over the seeds that both have, ± one standard deviation, and its signs.

    Args:
        scale: of the number; negative where less is better, which the difference then is multiplied by, too.
    """
    there_are = {other["seed"]: other[name] for other in others}
    differences = [scale * (r[name] - there_are[r["seed"]]) for r in results if r["seed"] in there_are]
    if results is others or len(differences) < 2:
        return ""
    told = f"{statistics.mean(differences):+.{digits}f} ± {statistics.stdev(differences):.{digits}f}"
    return f"{told} ({sum(each > 0 for each in differences)} of {len(differences)})"


def cuts(arms: Arms) -> str:
    """Tell what models could do right before a cut, right after it and at the end, medians over the seeds."""
    rows = []
    for arm, results in arms.items():
        seen = [around_the_cut(result) for result in results if len(result["cuts"]) == 1]
        if seen:
            before, after, end = (statistics.median(each) for each in zip(*seen, strict=True))
            step = statistics.median(result["cuts"][0]["step"] for result in results)
            rows.append([arm, f"{step:.0f}", f"{before:.1%}", f"{after:.1%}", f"{end:.1%}"])
    if not rows:
        return ""
    header = ["arm", "step of the cut", "accuracy before", "right after", "at the end"]
    return "## What a cut costs at once (medians)\n\n" + table(header, rows)


def around_the_cut(result: dict) -> tuple[float, float, float]:
    """Return the accuracy before a cut, after it and at the end."""
    step, probes = result["cuts"][0]["step"], result["probes"]
    before = [p["accuracy"] for p in probes if p["step"] <= step and p["state_size"] > end_size(result)]
    after = [p["accuracy"] for p in probes if p["step"] >= step and p["state_size"] == end_size(result)]
    return (before or [math.nan])[-1], (after or [math.nan])[0], result["accuracy"]


def reduced(results: list[dict]) -> str:
    """Tell what models can do once they are reduced after their training."""
    if not results:
        return ""
    found = {}
    for result in results:
        for point in result["reduced"]:
            found.setdefault(point["way"], {}).setdefault(point["state_size"], []).append(point)
    sizes = sorted({size for of_way in found.values() for size in of_way}, reverse=True)
    rows = [[way, *map(accuracy_and_loss, of_way.values())] for way, of_way in found.items()]
    text = f"## Reduced after training ({len(results)} seeds)\n\n"
    text += "Accuracy in % and in brackets loss in nats, without any further training; before it "
    text += f"{accuracy_and_loss(results, 4)}.\n\n"
    return text + table(["", *(f"N = {size}" for size in sizes)], rows)


def accuracy_and_loss(points: list[dict], digits: int = 2) -> str:
    """Return accuracy in %, and in brackets the loss with these digits, means ± standard deviations."""
    accuracy, loss = [100 * point["accuracy"] for point in points], [point["loss"] for point in points]
    return f"{spread(accuracy, 1)} ({spread(loss, digits)})"


def subspaces(results: list[dict]) -> str:
    """Tell how the subspaces turn that a cut would keep, and how the singular values move."""
    seen = [result for result in results if result.get("subspaces")]
    if not seen:
        return ""
    rows = []
    for place in range(len(seen[0]["subspaces"])):
        points = [(r["subspaces"][place], r["curve"][place]) for r in seen]
        moved = [
            max(m / w for m, w in zip(c["movement"], c["weyl_bound"], strict=True))
            for _, c in points
            if c["weyl_bound"]
        ]
        rows.append(
            [
                f"{points[0][0]['step']}",
                f"{statistics.mean(100 * c['accuracy'] for _, c in points):.0f}",
                *(
                    f"{statistics.mean(p[name] for p, _ in points):.2f}" if points[0][0][name] is not None else ""
                    for name in ("with_end", "with_before", "of_draws")
                ),
                f"{statistics.mean(effective_rank(c) for _, c in points):.1f}",
                f"{max(moved):.2f}" if moved else "",
            ]
        )
    header = ["step", "accuracy, %", "overlap with the end", "with a tenth before", "of two draws"]
    header += ["effective rank of σ²", "largest movement of a σ / Weyl's bound"]
    text = f"## When the ranking settles ({len(seen)} seeds)\n\n"
    text += "Overlaps are mean squared cosines of the principal angles of the subspaces that a cut would keep, 1 for "
    text += "equal ones; the effective rank is exp of the entropy of σ², mean over layers and seeds.\n\n"
    return text + table(header, rows)


def effective_rank(point: dict) -> float:
    """Return exp of the entropy of σ² / Σ σ², the mean over the layers."""
    spectra = map(torch.tensor, point["hankel_singular_values"])
    return statistics.mean(effective_number(spectrum.double().square()) for spectrum in spectra)


def figure_of_curves(arms: Arms, large: int, sizes: Iterable[int]) -> Figure:
    """Draw the accuracy along training, the median over the seeds with quartiles, of the chief arms of each size."""
    sizes = list(sizes)
    figure = Figure(figsize=(1 + 3.8 * len(sizes), 4.4), dpi=130, layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True):
        shown = {
            throughout(large): throughout(large),
            best_from_scratch(arms, large, size): "r from scratch",
            projected(size, large, "balanced"): f"r projected from {large} at the start",
            cut_at(0.25, large, size): f"{large} → r at 25 %",
            cut_when_able(large, size): f"{large} → r at {100 * ABLE:.0f} % accuracy",
        }
        for i, (arm, label) in enumerate(shown.items()):
            if arm in arms:
                _draw_curve(axes, arms[arm], f"C{i}", label)
        axes.axhline(100 * ABLE, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="step", title=f"r = {size}")
    figure.axes[0].set_ylabel("accuracy, % (median and quartiles of the seeds)")
    told = figure.axes[0].get_legend_handles_labels()
    figure.legend(*told, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _draw_curve(axes: Axes, results: list[dict], colour: str, label: str) -> None:
    """Draw the last probe of each step, of the steps that all runs have."""
    curves = [{probe["step"]: 100 * probe["accuracy"] for probe in result["probes"]} for result in results]
    steps = sorted(set.intersection(*map(set, curves)))
    low, middle, high = np.quantile([[curve[step] for step in steps] for curve in curves], [0.25, 0.5, 0.75], axis=0)
    axes.plot(steps, middle, color=colour, label=label, linewidth=1.5)
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def figure_of_seeds(arms: Arms, large: int, sizes: Iterable[int], value: Callable, label: str) -> Figure:
    """Draw a value of every seed in a line for each arm, those of one size in a panel.

    Args:
        value: result → number; infinite ones are counted beside the line.
    """
    sizes = list(sizes)
    shown = {size: arms_that_end_at(arms, large, size) for size in sizes}
    heights = [len(of_size) + 2 for of_size in shown.values()]
    most = max(len(results) for results in arms.values())
    figure = Figure(figsize=(8, 1 + 0.24 * sum(heights)), dpi=130, layout="constrained")
    panels = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        values = {arm: [value(result) for result in arms[arm]] for arm in shown[size]}
        order = sorted(values, key=partial(_place, values, throughout(large)))
        for row, arm in enumerate(order):
            there_are = [each for each in values[arm] if math.isfinite(each)]
            axes.plot(there_are, [row] * len(there_are), "o", color="C0", markersize=4, alpha=0.5, markeredgewidth=0)
            for statistic, mark in ((statistics.median, "|"), (statistics.mean, "d")):
                if math.isfinite(middle := statistic(values[arm])):
                    style = {"markersize": 11, "markeredgewidth": 2} if mark == "|" else {"markersize": 5}
                    axes.plot([middle], [row], mark, color="C3", **style)
            if missing := len(values[arm]) - len(there_are):
                place = {"xy": (1.01, row), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
                axes.annotate(f"{missing} of {len(values[arm])} never", **place, fontsize=7, va="center", color="C3")
        seeds = {arm: "" if len(values[arm]) == most else f" ({len(values[arm])} seeds)" for arm in order}
        axes.set_yticks(range(len(order)), [arm + seeds[arm] for arm in order], fontsize=7)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
        axes.set_title(f"{large} → {size}", fontsize=9)
    panels[-1].set_xlabel(f"{label} (dots: seeds; bar: median; diamond: mean)", fontsize=8)
    return figure


def _place(values: dict[str, list[float]], first: str, arm: str) -> tuple:
    """Return what arms are sorted by: how many seeds have no finite value, then the mean of the others."""
    there_are = [each for each in values[arm] if math.isfinite(each)]
    return arm != first, len(values[arm]) - len(there_are), statistics.mean(there_are or [0])


def figure_of_settling(results: list[dict], large: int, size: int) -> Figure:
    """Draw beside the accuracy of N throughout the effective rank and the overlap of subspaces, every seed.

    Args:
        size: r, the dimension of the subspaces.
    """
    figure = Figure(figsize=(12, 3.8), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for result in results:
        left.plot(
            *zip(*((p["step"], 100 * p["accuracy"]) for p in result["probes"]), strict=True), "C0", linewidth=0.8
        )
        points = [(point["step"], effective_rank(point)) for point in result["curve"]]
        middle.plot(*zip(*points, strict=True), "C1", linewidth=0.8)
        for name, colour in (("with_end", "C2"), ("of_draws", "0.6")):
            points = [(point["step"], point[name]) for point in result.get("subspaces", [])]
            if points:
                right.plot(*zip(*points, strict=True), colour, linewidth=0.8)
    left.set(xlabel="step", ylabel="accuracy, %")
    middle.set(xlabel="step", ylabel="effective rank of σ², mean of the layers")
    right.plot([], [], "C2", label="with the end")
    right.plot([], [], "0.6", label="of two draws of data")
    right.axhline(size / large, color="C3", linestyle=":", linewidth=1, label="of random subspaces")
    right.legend(frameon=False, fontsize=8)
    right.set(xlabel="step", ylabel="overlap of the kept subspaces", ylim=(0, 1.03))
    return figure


def recipe_of(result: dict) -> dict:
    return result["settings"]["recipe"]


def task_of(result: dict) -> str:
    """Return the task of a run in words."""
    task = result["settings"]["task"]
    if "pairs" in task:
        return f"recall of {task['pairs']} pairs of {task['keys']} keys"
    if "told" in task:
        return f"copying {task['told']} symbols of {task['symbols']} from among {task['length']}"
    return f"English, a vocabulary of {task['vocab_size']}"
