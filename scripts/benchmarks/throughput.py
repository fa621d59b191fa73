"""This study tells the price of a state: the tokens per second that a model trains on, by N and by what states are."""

from collections.abc import Iterable

import torch

from .family import Family
from .measuring import Limits, median, ratio_quartiles, show, table, time_in_turn
from .training import Training

BALANCED = "balanced"


def study_throughput(family: Family, limits: Limits) -> dict:
    """Time the steps of models that differ in N alone, in turn, with the fastest scan that there is.

    Where a family has them, balanced states of the largest model are timed, too, as a cut leaves them.
    """
    sizes = family.args.throughput_sizes
    print(f"Training step of a {family.title} by N: {', '.join(map(str, sizes))}", flush=True)
    trainings = {str(size): Training(family, size) for size in sizes}
    if BALANCED in family.bases:
        for size in sorted(set(sizes) - {max(sizes)}):
            name = f"{size} balanced of {max(sizes)}"
            try:
                trainings[name] = Training(family, max(sizes))
                trainings[name].cut(size, BALANCED)
            except torch.OutOfMemoryError:
                print(f"  {name} does not fit into memory.", flush=True)
                trainings.pop(name, None)
    seconds = time_in_turn({name: each.step for name, each in trainings.items()}, family.args.rounds, family.args)
    tokens, smallest = family.shape.batch * family.shape.length, smallest_of(seconds)
    return {
        "tokens_per_second": {name: tokens / median(values) for name, values in seconds.items()},
        "price_quartiles": {name: ratio_quartiles(values, seconds[smallest]) for name, values in seconds.items()},
        "seconds": seconds,
    }


def smallest_of(names: Iterable[str]) -> str:
    """Return the smallest N of those that were timed, balanced states aside."""
    return min(filter(str.isdecimal, names), key=int)


def throughput_tables(family: Family, result: dict) -> str:
    prices = result["price_quartiles"]
    rows = [[name, f"{speed:,.0f}", show(prices[name])] for name, speed in result["tokens_per_second"].items()]
    text = "### Training by N\n\n"
    text += f"{family.args.num_hidden_layers} layers of width {family.shape.channels // 2}, batch {family.shape.batch}"
    text += f", L {family.shape.length}\n\n"
    return text + table(["states", "tokens per second", f"time of a token / that at N = {smallest_of(prices)}"], rows)
