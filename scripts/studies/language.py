"""These studies ask whether a Mamba that starts large and shrinks beats a small one, at equal tokens and equal time.

Their arms, for the full size N and the smaller sizes r of a study, are:

- N throughout, and r from scratch, each at the learning rate that served its size best (one seed of its own, the same
  small grid for all sizes); what is cut trains at the rate of N;
- N → r after 10, 25, 50 and 80 % of the steps, with compensation (the default), and when the rankings have settled;
  at 25 and 50 % also with a refit;
- at the smallest r also without compensation, with random states and by magnitude instead of `output`, in four stages,
  and cut to half of r and grown back to r;
- sizes found by a tolerance and by a loss budget;
- cut at 10 % to the smallest r or by a loss budget, or as small as r from the start, and doubled whenever the scores
  of the states are flat, up to four times the smallest r;
- cut at 10 % with random states, or with what a model from scratch has at its start, to tell what an early cut suffers
  from (maps and moments with the first seed only);
- with two cycles of the learning rate: N, r from scratch and the cut at 50 %, soon after which the second cycle starts
  (the first seed only);
- cut to r at the first tenth after which N of the same seed has 90 % accuracy: without a refit, and with one, of the
  states that `output` and of those that `greedy` chose;
- at equal time: r from scratch with more steps and N with fewer, to last as long as the run that is cut at 50 %; of
  seeds that are added later as many as of those before.

Where a task has a range of difficulties, one run for each and for each size comes first: it shows where N decides.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from transformers import set_seed

from .arms import (
    ABLE,
    as_long_as,
    cut_at,
    cut_when_able,
    difficulty_run,
    from_scratch,
    grown_to,
    rate_run,
    refitted,
    throughout,
)
from .language_results import clock_of, report, seconds_of, steps_of
from .models import model_of
from .running import all_results, by_arm, carry_out_all, name_of
from .tasks import AssociativeRecall, SelectiveCopying
from .text import EnglishText
from .training import WHEN_FLAT, Recipe, trained

TUNING_SEED = 100  # of what comes before the comparison
MIDDLE = 0.50  # when the ablations are cut
REFITTED = (0.25, MIDDLE)  # when cuts are made with a refit, too
GROWTH = 4  # times the smallest size, at most, where states grow when they are flat
SETTLED = {"trigger": "settled", "start": 0.05, "end": 0.9}
REFIT = {"refit": True, "calibration_batches": 6}
ABLATIONS = {
    "not compensated": {"compensate": False},
    "random states": {"selection": "random"},
    "random states, not compensated": {"selection": "random", "compensate": False},
    "magnitude, not compensated": {"criterion": "magnitude", "compensate": False},
}
EARLY = {
    "random states": {"reduction": {"selection": "random"}},
    "decay rates afresh": {"afresh": ("decay rates",)},
    "decay rates and maps afresh": {"afresh": ("decay rates", "maps")},
    "decay rates, maps and moments afresh": {"afresh": ("decay rates", "maps", "moments")},
}
Task = AssociativeRecall | SelectiveCopying | EnglishText


@dataclass(frozen=True)
class Run:
    """A run is one training: its row in the table, its seed, how it is trained, and on what."""

    arm: str
    seed: int
    recipe: Recipe
    task: Task

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return name_of(self.arm, self.seed)


@dataclass(frozen=True)
class Study:
    """A study holds what all of its runs share.

    Attributes:
        architecture, training: options of MambaConfig and of TrainingArguments.
        sizes: the full N, then those it is cut to, descending.
        learning_rates: the grid.
        difficulties: of the task, for the sweep that comes first.
        windows: fractions of the run at which it is cut; one of them is `MIDDLE`.
        ablations: whether the smallest size is also reached in all the other ways.
    """

    task: Task
    architecture: dict
    training: dict
    steps: int
    sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    difficulties: tuple[Task, ...] = ()
    windows: tuple[float, ...] = (0.10, 0.25, 0.50, 0.80)
    ablations: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)

    def carry_out(self, seeds: list[int], root: Path, jobs: int) -> None:
        """Carry out all runs that have no results yet."""
        self.task.prepare(root)
        before = carry_out_all(self, [*self.sweep(self.swept), *self.tuning()], root, jobs)
        rates = self.best_rates(before)
        compared = list(self.compared(rates, seeds))
        results = carry_out_all(self, compared, root, jobs)
        carry_out_all(self, list(self.equally_long(rates, seeds, results, root)), root, jobs)
        if self.ablations:
            carry_out_all(self, list(self.once_able(rates, seeds, results)), root, jobs)

    def perform(self, run: Run, folder: Path) -> dict:
        """Train, and measure on the way."""
        set_seed(run.seed)
        data = run.task.training(
            run.recipe.steps * self.training["per_device_train_batch_size"], run.seed, folder.parent
        )
        model = model_of(self.architecture | run.task.architecture(), run.recipe.state_size)
        measure = run.task.measure(folder.parent)
        result = trained(run.recipe, self.training, model, data, measure, run.seed, folder)
        return result | measure(model)

    def settings(self, run: Run) -> dict:
        """Return all that a result depends on."""
        return {"architecture": self.architecture, "training": self.training} | {
            "task": asdict(run.task),
            "recipe": run.recipe.told(),
        }

    def line(self, result: dict) -> str:
        """Say in a line what came out of a run."""
        return f"accuracy {result['accuracy']:.1%}, loss {result['loss']:.4f} at N = {result['state_sizes'][0]}"

    def report(self, root: Path, results: list[dict]) -> None:
        """Print the tables, and put them and the figures beside the runs."""
        report(root, results)

    def sweep(self, recipe: Callable[[int], Recipe]) -> Iterator[Run]:
        """Yield a run for every difficulty at every size, trained as `recipe` says of the size."""
        for task in self.difficulties:
            for size in self.sizes:
                yield Run(difficulty_run(task.difficulty, size), TUNING_SEED, recipe(size), task)

    def swept(self, size: int) -> Recipe:
        """Return how a size is trained at every difficulty: at the learning rate in the middle of the grid."""
        return Recipe(size, self.learning_rates[(len(self.learning_rates) - 1) // 2], self.steps)

    def tuning(self) -> Iterator[Run]:
        """Yield a run for every learning rate at every size."""
        for size in self.sizes:
            for rate in self.learning_rates:
                yield self.tried(size, rate)

    def tried(self, size: int, rate: float) -> Run:
        return Run(rate_run(rate, size), TUNING_SEED, Recipe(size, rate, self.steps), self.task)

    def best_rates(self, results: dict[str, dict]) -> dict[int, float]:
        """Return size → the learning rate at which its loss was lowest."""
        return {
            size: min(self.learning_rates, key=lambda rate: results[self.tried(size, rate).name]["loss"])
            for size in self.sizes
        }

    def compared(self, rates: dict[int, float], seeds: list[int]) -> Iterator[Run]:
        """Yield the arms at equal tokens."""
        full, *targets = self.sizes
        for seed in seeds:
            recipes = {throughout(full): Recipe(full, rates[full], self.steps)}
            for size in targets:
                recipes[from_scratch(size)] = Recipe(size, rates[size], self.steps)
            for arm, cut in self.cuts(seed == seeds[0]).items():
                recipes[arm] = Recipe(full, rates[full], self.steps, **cut)
            if self.ablations:
                small, limit = from_scratch(targets[-1]), GROWTH * targets[-1]
                recipes[grown_to(small, limit)] = replace(recipes[small], grown=(WHEN_FLAT, limit))
            if self.ablations and seed == seeds[0]:
                restarted = [throughout(full), *map(from_scratch, targets)]
                restarted += [cut_at(MIDDLE, full, size) for size in targets]
                recipes |= {f"{arm}, two cycles": replace(recipes[arm], cycles=2) for arm in restarted}
            for arm, recipe in recipes.items():
                yield Run(arm, seed, recipe, self.task)

    def cuts(self, is_first_seed: bool) -> dict[str, dict]:
        """Return arm → how the full model is reduced, as a `Recipe` has it."""
        full, *targets = self.sizes
        cuts = {}
        for size in targets:
            goal = {"target_state_size": size}
            for end in self.windows:
                cuts[cut_at(end, full, size)] = {"reduction": goal, "schedule": once(end)}
            for end in set(REFITTED).intersection(self.windows):
                cuts[refitted(cut_at(end, full, size))] = {"reduction": goal | REFIT, "schedule": once(end)}
            if self.ablations:
                cuts[f"{full} → {size} when settled"] = {"reduction": goal, "schedule": SETTLED}
        if self.ablations:
            smallest = targets[-1]
            goal, middle = {"target_state_size": smallest}, cut_at(MIDDLE, full, smallest)
            for name, options in ABLATIONS.items():
                cuts[f"{middle}, {name}"] = {"reduction": goal | options, "schedule": once(MIDDLE)}
            stages = {"start": 0.1, "end": MIDDLE, "events": 4}
            cuts[f"{full} → {smallest} in four stages to 50 %"] = {"reduction": goal, "schedule": stages}
            half = smallest // 2
            regrown = {"reduction": {"target_state_size": half}, "schedule": once(0.1), "grown": (MIDDLE, smallest)}
            cuts[f"{full} → {half} at 10 %, grown to {smallest} at 50 %"] = regrown
            for name, options in EARLY.items() if is_first_seed else list(EARLY.items())[:2]:
                early = options | {"reduction": goal | options.get("reduction", {}), "schedule": once(0.1)}
                cuts[f"{cut_at(0.1, full, smallest)}, {name}"] = early
            for end in (0.1, MIDDLE):
                for found_by, name in (({"tolerance": 0.1}, "τ = 0.1"), ({"loss_budget": 0.01}, "loss budget 0.01")):
                    cuts[f"{name} at {round(100 * end)} %"] = {"reduction": found_by, "schedule": once(end)}
            limit = GROWTH * smallest
            for arm in (cut_at(0.1, full, smallest), "loss budget 0.01 at 10 %"):
                cuts[grown_to(arm, limit)] = cuts[arm] | {"grown": (WHEN_FLAT, limit)}
        return cuts

    def equally_long(
        self, rates: dict[int, float], seeds: list[int], results: dict[str, dict], root: Path
    ) -> Iterator[Run]:
        """Yield N with fewer steps and r with more, to last as long as the run that is cut in the middle."""
        full, *targets = self.sizes
        compared = by_arm(results.values())
        clock = clock_of(compared)
        steps_before = {arm: steps_of(of_arm[0]) for arm, of_arm in by_arm(all_results(root)).items()}
        for is_full in (False, True):
            for size in targets:
                cut = cut_at(MIDDLE, full, size)
                chosen, arm = (full, throughout(full)) if is_full else (size, from_scratch(size))
                arm = as_long_as(arm, cut)
                fitting = mean(seconds_of(result, clock) for result in compared[cut]) / clock[str(chosen)]
                recipe = Recipe(chosen, rates[chosen], steps_before.get(arm, round(fitting)))
                for seed in seeds:
                    yield Run(arm, seed, recipe, self.task)

    def once_able(self, rates: dict[int, float], seeds: list[int], results: dict[str, dict]) -> Iterator[Run]:
        """Yield cuts at the first tenth of the run after which N throughout, with the same seed, was able."""
        full, *targets = self.sizes
        for size in targets:
            for seed in seeds:
                curve = results[name_of(throughout(full), seed)]["curve"]
                moment = next((point["step"] / self.steps for point in curve if point["accuracy"] >= ABLE), 0.9)
                goal, arm = {"target_state_size": size}, cut_when_able(full, size)
                cuts = {arm: goal, refitted(arm): goal | REFIT}
                cuts[refitted(f"{arm}, greedy")] = goal | REFIT | {"criterion": "greedy"}
                for name, options in cuts.items():
                    recipe = Recipe(full, rates[full], self.steps, reduction=options, schedule=once(moment))
                    yield Run(name, seed, recipe, self.task)


def once(end: float) -> dict:
    """Return a schedule of one cut, after this fraction of the steps."""
    return {"start": 0.0, "end": end, "events": 1}


RECALL = AssociativeRecall(pairs=16, queries=16, keys=32, values=32)
COPYING = SelectiveCopying(told=12, length=24, symbols=16)
ONE_BLOCK = {"hidden_size": 64, "num_hidden_layers": 1}

STUDIES = {
    "recall": Study(
        task=RECALL,
        architecture=ONE_BLOCK,
        training={"per_device_train_batch_size": 64},
        steps=1000,
        sizes=(64, 16, 4),
        learning_rates=(8e-3, 1.6e-2, 3.2e-2),
        difficulties=(replace(RECALL, pairs=8, keys=16, values=16), replace(RECALL, pairs=8)),
    ),
    "copying": Study(
        task=COPYING,
        architecture=ONE_BLOCK,
        training={"per_device_train_batch_size": 64},
        steps=1000,
        sizes=(64, 16, 4),
        learning_rates=(8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        difficulties=(replace(COPYING, told=16, length=32),),
        ablations=False,
        seeds=(0, 1, 2, 3, 4),
    ),
    "lm": Study(
        task=EnglishText(vocab_size=257, length=512, validation_sequences=64),  # bytes, and the end of a text
        architecture={"hidden_size": 64, "num_hidden_layers": 2},
        training={"per_device_train_batch_size": 4},
        steps=2000,
        sizes=(64, 16, 4),
        learning_rates=(8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        windows=(0.10, 0.50, 0.80),
        ablations=False,
    ),
    "lm-large": Study(
        task=EnglishText(vocab_size=16384, length=1024, validation_sequences=256, tokenizer_characters=40_000_000),
        architecture={"hidden_size": 512, "num_hidden_layers": 12},
        training={"per_device_train_batch_size": 32, "bf16": True},
        steps=10_000,
        sizes=(128, 32, 16, 8),
        learning_rates=(5e-4, 1e-3, 2e-3),
    ),
}
