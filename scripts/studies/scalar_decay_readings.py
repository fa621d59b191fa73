"""This module reads off the results of the studies of Mamba-2 what their tables and figures show."""

import json
import math
import statistics
from pathlib import Path

import torch

from .arms import ABLE, from_scratch, started_as, throughout
from .language_results import steps_at_sizes
from .training import effective_number

Arms = dict[str, list[dict]]  # arm → its results, a seed each
CLOCK = "price.json"  # what scripts/benchmark.py wrote for `throughput` at the shapes of a study
PUBLISHED = {128: 65, 64: 100, 32: 150, 16: 195}  # thousand tokens/s on an H100 by N, state-spaces/mamba #479


def recipe_of(result: dict) -> dict:
    return result["settings"]["recipe"]


def end_size(result: dict) -> int:
    """Return N at the end of a run."""
    return max(result["state_sizes"])


def task_of(result: dict) -> str:
    """Return the task of a run in words."""
    task = result["settings"]["task"]
    if "pairs" in task:
        return f"recall of {task['pairs']} pairs of {task['keys']} keys"
    if "told" in task:
        return f"copying {task['told']} symbols of {task['symbols']} from among {task['length']}"
    return f"English, a vocabulary of {task['vocab_size']}"


def first_able(probes: list[dict], size: int | None = None) -> int | None:
    """Return the first step at which a model of this size, of any for None, was right in 90 % of the cases."""
    return next((p["step"] for p in probes if p["accuracy"] >= ABLE and size in (None, p["state_size"])), None)


def step_or_never(result: dict) -> float:
    """Return the first step at which the model was as small as at the end, and able; ∞ if there is none."""
    step = first_able(result["probes"], end_size(result))
    return math.inf if step is None else step


def merit(result: dict) -> tuple[float, float]:
    """Return what starts are compared by, less is better: the step at which a run became able, then its loss."""
    step = first_able(result["probes"])
    return math.inf if step is None else step, result["loss"]


def throughput(size: int) -> float:
    """Return the published throughput at N, or at the next size that is known."""
    return PUBLISHED[min(known for known in PUBLISHED if known >= size)]


def price(result: dict, end: float, large: int) -> float:
    """Return what the steps up to one cost, in steps at N = `large`."""
    if math.isinf(end):
        return end
    return sum(steps * throughput(large) / throughput(size) for size, steps in steps_at_sizes(result, end))


def clock_of(root: Path) -> dict[str, float]:
    """Return the seconds of a step by N, and by "r balanced of N", where a benchmark measured them; else nothing."""
    if not (root / CLOCK).exists():
        return {}
    measured = json.loads((root / CLOCK).read_text())["mamba2"]["throughput"]["seconds"]
    return {name: statistics.median(seconds) for name, seconds in measured.items()}


def seconds(result: dict, end: float, large: int, clock: dict[str, float]) -> float:
    """Return what the steps up to one take by a clock, those at a size in between as at the next one that is known."""
    if math.isinf(end):
        return end
    recipe = recipe_of(result)
    is_balanced = recipe.get("projected") or (recipe["reduction"] or {}).get("basis") == "balanced"
    kind = f" balanced of {large}" if is_balanced else ""
    names = [f"{size}{kind}" for size in range(large) if f"{size}{kind}" in clock]
    of_size = {int(name.split()[0]): clock[name] for name in [*names, str(large)]}
    return sum(
        steps * of_size[min(known for known in of_size if known >= size)]
        for size, steps in steps_at_sizes(result, end)
    )


def around_the_cut(result: dict) -> tuple[float, float, float]:
    """Return the accuracy before a cut, after it and at the end."""
    step, probes = result["cuts"][0]["step"], result["probes"]
    before = [p["accuracy"] for p in probes if p["step"] <= step and p["state_size"] > end_size(result)]
    after = [p["accuracy"] for p in probes if p["step"] >= step and p["state_size"] == end_size(result)]
    return (before or [math.nan])[-1], (after or [math.nan])[0], result["accuracy"]


def effective_rank(point: dict) -> float:
    """Return exp of the entropy of σ² / Σ σ², the mean over the layers."""
    spectra = map(torch.tensor, point["hankel_singular_values"])
    return statistics.mean(effective_number(spectrum.double().square()) for spectrum in spectra)


def arms_that_end_at(arms: Arms, large: int, size: int) -> list[str]:
    """Return N throughout, then the arms that are as small at the end: from scratch, projected, cut."""
    found = [arm for arm, results in arms.items() if end_size(results[0]) == size]
    return [throughout(large), *sorted(found, key=lambda arm: ("→" in arm, "projected" in arm))]


def best_from_scratch(arms: Arms, large: int, size: int) -> str:
    """Return which start served the small size better with all seeds, where there are two."""
    there_are = [arm for arm in (from_scratch(size), started_as(size, large)) if arm in arms]
    return max(there_are, key=lambda arm: statistics.mean(result["accuracy"] for result in arms[arm]))
