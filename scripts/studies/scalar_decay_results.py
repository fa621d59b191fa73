"""This module makes the report of a study of Mamba-2, its tables and figures, from the JSONs of its runs alone."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks.measuring import table

from hf_compressm.plotting import save_figure
from hf_compressm.storage.files import write_aside

from .arms import ABLE, from_scratch, projected, then_reduced, throughout
from .language_results import BEFORE_COMPARISON, spread
from .running import by_arm
from .scalar_decay_figures import figure_of_curves, figure_of_seeds, figure_of_settling
from .scalar_decay_readings import (
    Arms,
    arms_that_end_at,
    around_the_cut,
    best_from_scratch,
    clock_of,
    effective_rank,
    end_size,
    first_able,
    merit,
    price,
    recipe_of,
    seconds,
    step_or_never,
    task_of,
)

RESAMPLES = 10_000


def report(root: Path, results: list[dict]) -> None:
    """Print the tables, and put them and the figures beside the runs."""
    arms = by_arm(results)
    compared = {arm: of_arm for arm, of_arm in arms.items() if not arm.startswith(BEFORE_COMPARISON)}
    sections = [tuning(arms), difficulties(arms)]
    large = max(recipe_of(of_arm[0])["state_size"] for of_arm in arms.values())
    full = throughout(large)
    if full in compared:
        sizes = sorted({end_size(of_arm[0]) for of_arm in compared.values()} - {large}, reverse=True)
        is_text = "recall_loss" in compared[full][0]
        compare = comparison_of_text if is_text else partial(comparison, clock=clock_of(root))
        sections += [compare(compared, large, size) for size in sizes]
        sections += [cuts(compared), reduced(compared.get(then_reduced(large), [])), subspaces(compared[full])]
        if is_text:
            ends = figure_of_seeds(compared, large, sizes, lambda r: r["loss"], "loss at the end, nats")
        else:
            save_figure(figure_of_curves(compared, large, sizes), root / "curves.png")
            steps = f"step at which a model of the final size, so after its cut, passed {ABLE:.0%}"
            save_figure(figure_of_seeds(compared, large, sizes, step_or_never, steps), root / "steps.png")
            percent = "accuracy at the end, %"
            ends = figure_of_seeds(compared, large, sizes, lambda r: 100 * r["accuracy"], percent)
        save_figure(ends, root / "ends.png")
        save_figure(figure_of_settling(compared[full], large, sizes[len(sizes) // 2]), root / "settling.png")
    text = "\n".join(section for section in sections if section)
    write_aside(root / "tables.md", lambda path: path.write_text(text))
    print(text)


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


def comparison(arms: Arms, large: int, size: int, clock: dict[str, float]) -> str:
    """Tell what every arm that ends at this size came to, beside N throughout.

    Args:
        clock: as of `clock_of`; without one no seconds are told.
    """
    full, scratch = throughout(large), best_from_scratch(arms, large, size)
    control = projected(size, large, "balanced")
    rows = []
    for arm in arms_that_end_at(arms, large, size):
        results = arms[arm]
        steps = [step_or_never(result) for result in results]
        prices = [price(result, step, large) for result, step in zip(results, steps, strict=True)]
        times = [seconds(result, step, large, clock) for result, step in zip(results, steps, strict=True) if clock]
        rows.append(
            [
                arm,
                str(len(results)),
                with_interval([100 * r["accuracy"] for r in results], statistics.mean, 1),
                f"{sum(map(math.isfinite, steps))}",
                with_interval(steps, statistics.median, 0),
                with_interval(prices, statistics.median, 0),
                *([with_interval(times, statistics.median, 1)] if clock else []),
                paired(results, arms.get(scratch, []), "accuracy", 100, 1),
                paired(results, arms.get(control, []), "accuracy", 100, 1),
            ]
        )
    header = ["arm", "seeds", "accuracy at the end, %", f"seeds that passed {ABLE:.0%}", "median step", "median price"]
    header += ["median seconds"] if clock else []
    header += [f"more than {scratch}", f"more than {control}"]
    text = f"## {large} → {size} ({task_of(arms[full][0])})\n\n"
    text += f"With bootstrap intervals of 95 % over the seeds. A step counts at which a model of {size} states passed "
    text += f"{ABLE:.0%}; for {full}, one of {large}. A price is in steps of N = {large}, by the published "
    text += (
        f"throughputs of an H100{', seconds are those of one CPU core' if clock else ''}. Differences are in points, "
    )
    text += "by seed, ± one standard deviation; in brackets in how many seeds an arm is better.\n\n"
    return text + table(header, rows)


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
