"""These studies ask of Mamba-2 whether what starts large and shrinks does what a small state cannot, and why.

Recall is a phase transition: for hundreds of steps nothing is recalled, then within a few dozen all. So these studies
measure when a run passes 90 %, with ten seeds, and against controls that tell training from architecture. Their arms,
for the full N and the smaller sizes r, are:

- N throughout, and r from scratch, each at the learning rate and the initial scale of B and C with which its size
  passed 90 % first (a grid, one seed of its own), and where that of N is another one also with that; what is cut
  trains as N does;
- r from scratch with as many steps as the price of an H100 pays for N throughout, and for the cut at 25 %;
- r states that are projected from N features from the start, in random and in balanced subspaces, at the best learning
  rate: the architecture of a cut model without its training;
- N → r at 5, 10, 25, 50 and 80 % of the steps in the balanced basis, when N of the same seed has passed 90 %, and when
  the spectra have settled;
- at the size in the middle also: with refits, as a stock class by four choices of states, in four stages, and cut at
  10 % with parts that start anew, one at a time;
- N throughout, reduced after its training to each r in each way.

All arms of a seed see the same sequences in the same order, so up to its cut a run is the run of N, step by step; on a
GPU but for round-off, which grows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import set_seed

from .arms import (
    as_long_as,
    cut_at,
    cut_when_able,
    from_scratch,
    projected,
    rate_run,
    started_as,
    then_reduced,
    throughout,
)
from .language import COPYING, MIDDLE, RECALL, REFIT, SETTLED, TUNING_SEED, Run, Study, Task, once
from .models import AFRESH, ROWS, model_of, project, reductions
from .running import carry_out_all
from .scalar_decay_readings import first_able, merit, throughput
from .scalar_decay_results import report
from .subspaces import SubspaceObserver
from .text import EnglishText
from .training import Observer, Recipe, ranking_batches, trained

BALANCED, STOCK = {"basis": "balanced"}, {"basis": "axis"}
LATER = 0.25  # when a cut is made that others are to last as long as
AS_STOCK = "greedy, refitted"
WAYS = {
    "balanced, refitted": BALANCED | REFIT,
    AS_STOCK: STOCK | REFIT | {"criterion": "greedy"},
    "RRQR, refitted": STOCK | REFIT | {"criterion": "rrqr"},
    "GHOST": STOCK | {"criterion": "ghost"},
    "GHOST, refitted": STOCK | REFIT | {"criterion": "ghost"},
    "random states": STOCK | {"selection": "random"},
}
IN_STAGES = {"start": 0.1, "end": MIDDLE, "events": 4}


@dataclass(frozen=True)
class Start:
    """A start is what is tuned: the learning rate, and what the initial weights of B and C are multiplied by."""

    learning_rate: float
    map_scale: float

    def recipe(self, size: int, steps: int) -> Recipe:
        """Return how a model is trained from here without a cut."""
        return Recipe(size, self.learning_rate, steps, map_scale=self.map_scale)


@dataclass(frozen=True)
class ScalarDecayStudy(Study):
    """A study of Mamba-2 has a wider grid, and arms that the first studies suggested.

    Attributes:
        scales: of B and C at the start, the other dimension of the grid.
        tuned_on: the task that starts are tuned on, an easier one than that of the study; None for the same.
        ablations: whether the size in the middle is also reached in all the other ways.
    """

    scales: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    tuned_on: Task | None = None
    seeds: tuple[int, ...] = tuple(range(10))
    windows: tuple[float, ...] = (0.05, 0.10, 0.25, 0.50, 0.80)

    def carry_out(self, seeds: list[int], root: Path, jobs: int) -> None:
        """Carry out all runs that have no results yet; an arm is finished before the next one, the important first."""
        self.task.prepare(root)
        starts = self.best_starts(carry_out_all(self, list(self.tuning()), root, jobs))
        carry_out_all(self, list(self.sweep(lambda size: starts[size].recipe(size, self.steps))), root, jobs)
        full = starts[self.sizes[0]].recipe(self.sizes[0], self.steps)
        runs = [Run(throughout(self.sizes[0]), seed, full, self.task) for seed in seeds]
        reference = carry_out_all(self, runs, root, jobs)
        arms = [self.arms(starts, full, reference[run.name]) for run in runs]
        runs = [Run(arm, seed, arms[i][arm], self.task) for arm in arms[0] for i, seed in enumerate(seeds)]
        carry_out_all(self, runs, root, jobs)

    def perform(self, run: Run, folder: Path) -> dict:
        """Train, and measure on the way."""
        set_seed(run.seed)
        recipe, task, root = run.recipe, run.task, folder.parent
        data = task.training(recipe.steps * self.training["per_device_train_batch_size"], run.seed, root)
        model = model_of(self.architecture | task.architecture(), recipe.state_size, recipe.map_scale)
        batches = ranking_batches(data, self.training)
        if recipe.projected:
            project(model, *recipe.projected, batches, run.seed)
        measure, probe, observers = task.measure(root), task.measure(root, task.probed), ()
        if run.arm == throughout(self.sizes[0]):
            turning = SubspaceObserver(self.middle, batches)
            observers = Observer(measure, batches), turning
        result = trained(recipe, self.training, model, data, measure, run.seed, folder, probe, observers)
        result |= measure(model) | ({"subspaces": turning.overlaps()} if observers else {})
        if run.arm == then_reduced(self.sizes[0]):
            result["reduced"] = reductions(model, self.sizes[1:], {"balanced": BALANCED} | WAYS, batches, measure)
        return result

    def report(self, root: Path, results: list[dict]) -> None:
        """Print the tables, and put them and the figures beside the runs."""
        report(root, results)

    def tuning(self) -> Iterator[Run]:
        """Yield the runs of the grid, for every size and for the projected control."""
        for size in (*self.sizes, None):
            for start in self.grid:
                yield self.tried(size, start)

    @property
    def grid(self) -> list[Start]:
        """All starts that are tried."""
        return [Start(rate, scale) for rate in self.learning_rates for scale in self.scales]

    def tried(self, size: int | None, start: Start) -> Run:
        """Return the run of a size, or of the projected control for None, in the grid."""
        full = size or self.sizes[0]
        recipe, arm = start.recipe(full, self.steps), rate_run(start.learning_rate, full, start.map_scale)
        if size is None:
            arm, recipe = f"{arm}, projected to {self.middle}", replace(recipe, projected=(self.middle, "balanced"))
        return Run(arm, TUNING_SEED, recipe, self.tuned_on or self.task)

    def best_starts(self, results: dict[str, dict]) -> dict[int | None, Start]:
        """Return size → the start that passed 90 % first, or led to the lowest loss; of the projected one for None."""

        def merit_of(size: int | None, start: Start) -> tuple[float, float]:
            return merit(results[self.tried(size, start).name])

        return {size: min(self.grid, key=partial(merit_of, size)) for size in (*self.sizes, None)}

    @property
    def middle(self) -> int:
        """The size of the ablations."""
        return self.sizes[1 + (len(self.sizes) - 1) // 2]

    def arms(self, starts: dict[int | None, Start], full: Recipe, throughout_: dict) -> dict[str, Recipe]:
        """Return arm → recipe of a seed, the important arms first.

        Args:
            throughout_: the result of N throughout with this seed.
        """
        large, *small = self.sizes
        small.sort(key=lambda size: size != self.middle)
        able = first_able(throughout_["probes"])
        moment = 0.9 if able is None else able / self.steps
        arms = {}
        for size in small:
            cut = replace(full, reduction={"target_state_size": size} | BALANCED)
            scratch = {from_scratch(size): starts[size].recipe(size, self.steps)}
            if starts[size] != starts[large]:
                scratch[started_as(size, large)] = starts[large].recipe(size, self.steps)
            arms |= scratch
            if not isinstance(self.task, EnglishText):  # of which a model is never able in that sense
                arms[cut_when_able(large, size)] = replace(cut, schedule=once(moment))
            for rows in reversed(ROWS):
                control = starts[None].recipe(large, self.steps)
                arms[projected(size, large, rows)] = replace(control, projected=(size, rows))
            for end in self.windows:
                arms[cut_at(end, large, size)] = replace(cut, schedule=once(end))
            stock = {"target_state_size": size} | WAYS[AS_STOCK]
            arms[f"{cut_at(MIDDLE, large, size)}, {AS_STOCK}"] = replace(full, reduction=stock, schedule=once(MIDDLE))
            price = throughput(size) / throughput(large)
            for arm, recipe in scratch.items():
                for other, share in ((throughout(large), 1), (cut_at(LATER, large, size), LATER)):
                    steps = round(self.steps * (share * price + 1 - share))
                    arms[as_long_as(arm, other)] = replace(recipe, steps=steps)
        return arms | (self.ablations_of(self.middle, full, moment) if self.ablations else {})

    def ablations_of(self, size: int, full: Recipe, moment: float) -> dict[str, Recipe]:
        """Return arm → recipe of all other ways to this size."""
        large, goal = self.sizes[0], {"target_state_size": size}
        able, middle, early = cut_when_able(large, size), cut_at(MIDDLE, large, size), cut_at(0.1, large, size)
        arms = {then_reduced(large): full}
        for name, way in WAYS.items():
            arms[f"{able}, {name}"] = replace(full, reduction=goal | way, schedule=once(moment))
        arms[f"{middle}, GHOST"] = replace(full, reduction=goal | WAYS["GHOST"], schedule=once(MIDDLE))
        cut = replace(full, reduction=goal | BALANCED)
        arms[f"{large} → {size} in four stages to 50 %"] = replace(cut, schedule=IN_STAGES)
        arms[f"{large} → {size} when settled"] = replace(cut, schedule=SETTLED)
        for part in AFRESH:
            arms[f"{early}, {part} afresh"] = replace(cut, schedule=once(0.1), afresh=(part,))
        return arms


TWO_BLOCKS = {"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16}
TWO_BLOCKS |= {"n_groups": 1, "chunk_size": 64}
HYBRID = {"model_type": "bamba", "hidden_size": 64, "num_hidden_layers": 3, "attn_layer_indices": [1]}
HYBRID |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "mamba_n_heads": 8}
HYBRID |= {"mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 64}
HYBRID |= {"initializer_range": 0.1}  # as that of Mamba-2
BATCHES_OF_64 = {"per_device_train_batch_size": 64}

RECALL_32 = replace(RECALL, pairs=32, queries=32, keys=64)
RECALL_64 = replace(RECALL, pairs=64, queries=64, keys=128)
RECALL_128 = replace(RECALL, pairs=128, queries=128, keys=256)

ENGLISH = ScalarDecayStudy(
    task=EnglishText(vocab_size=257, length=512, validation_sequences=64),
    architecture=TWO_BLOCKS,
    training={"per_device_train_batch_size": 4},
    steps=1500,
    sizes=(64, 8),
    learning_rates=(4e-3, 8e-3, 1.6e-2),
    scales=(1.0, 4.0),
    windows=(0.10, 0.25, 0.50),
    ablations=False,
    seeds=(0, 1, 2),
)

STUDIES = {
    "recall-mamba2": ScalarDecayStudy(
        task=RECALL_32,
        architecture=TWO_BLOCKS,
        training=BATCHES_OF_64,
        steps=600,
        sizes=(64, 16, 8, 4),
        learning_rates=(4e-3, 8e-3, 1.6e-2),
        difficulties=(RECALL_64, RECALL_128),
        tuned_on=RECALL,
    ),
    "recall-hard-mamba2": ScalarDecayStudy(
        task=RECALL_64,
        architecture=TWO_BLOCKS,
        training=BATCHES_OF_64,
        steps=600,
        sizes=(64, 8),
        learning_rates=(4e-3, 8e-3, 1.6e-2),
        tuned_on=RECALL,
        windows=(0.25, 0.50),
        ablations=False,
        seeds=(0, 1, 2, 3, 4),
    ),
    "copying-mamba2": ScalarDecayStudy(
        task=COPYING,
        architecture=TWO_BLOCKS,
        training=BATCHES_OF_64,
        steps=600,
        sizes=(64, 8),
        learning_rates=(8e-3, 1.6e-2),
        scales=(1.0, 4.0),
        windows=(0.25, 0.50),
        ablations=False,
        seeds=(0, 1, 2, 3, 4),
    ),
    "lm-mamba2": ENGLISH,
    "lm-bpe-mamba2": replace(ENGLISH, task=replace(ENGLISH.task, vocab_size=2048), learning_rates=(8e-3, 1.6e-2)),
    "recall-bamba": ScalarDecayStudy(
        task=RECALL,
        architecture=HYBRID,
        training=BATCHES_OF_64,
        steps=800,
        sizes=(64, 8),
        learning_rates=(2e-3, 4e-3),
        scales=(1.0, 4.0),
        windows=(0.25, 0.50),
        ablations=False,
        seeds=(0, 1, 2, 3, 4),
    ),
}
