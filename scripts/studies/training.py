"""This module trains a Mamba in a study: what is cut or grown when, what is measured, how long it takes."""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan, parameter_groups
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.storage.history import save_history
from hf_compressm.surgery.shrink_and_grow import grow_state
from hf_compressm.training.monitor import StateMonitor

from .models import start_afresh
from .tasks import Sequences

OBSERVATIONS = 10  # in each run: after every tenth of the steps
RANKING_BATCHES = 8  # two draws of four
WHEN_FLAT = "flat"
FLAT = 0.8  # the share of the states that the scores amount to, from which on they are flat
PROBES = 40  # in each run, where the moment counts at which a model becomes able to do a task


@dataclass(frozen=True)
class Recipe:
    """A recipe says how a run is trained, in numbers and names only.

    Attributes:
        reduction, schedule: options of CompreSSMConfig and CompreSSMSchedule; without them nothing is cut.
        grown: (moment, size); the moment at which states are added is a fraction of the run, or `WHEN_FLAT`, which
            doubles them whenever the scores of all layers are flat, until there are `size`.
        afresh: names of `AFRESH` that start anew after the cut, to find out what it suffers from.
        cycles: cycles of the learning rate: with two it starts again from its peak in the middle after the warm-up.
        map_scale: what the initial weights of B and C are multiplied by.
        projected: (r, one of `ROWS`): the model starts with r states, projected from `state_size` features.
    """

    state_size: int
    learning_rate: float
    steps: int
    reduction: dict | None = None
    schedule: dict = field(default_factory=dict)
    grown: tuple[float | str, int] | None = None
    afresh: tuple[str, ...] = ()
    cycles: int = 1
    map_scale: float = 1.0
    projected: tuple[int, str] | None = None

    def told(self) -> dict:
        """Return it as JSON types; what came later is left out where it has no effect, as in results from before."""
        later = {field.name: field.default for field in fields(self) if field.name in ("map_scale", "projected")}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


class StudyTrainer(Trainer):
    """This Trainer applies no weight decay to the state space parameters."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        groups = parameter_groups(self.model, self.args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, betas=(0.9, 0.95))
        return self.optimizer


class Stopwatch(TrainerCallback):
    """It times training steps by state size, without what callbacks do, and so precedes those that cut."""

    def __init__(self):
        self.steps: dict[int, list[float]] = defaultdict(list)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.size, self.started = max(state_sizes(model).values()), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[self.size].append(time.perf_counter() - self.started)

    @property
    def seconds_per_step(self) -> dict[int, float]:
        return {size: median(times) for size, times in self.steps.items()}

    @property
    def seconds(self) -> float:
        """Return the seconds of all steps, each as long as the median one at its size."""
        return sum(len(self.steps[size]) * seconds for size, seconds in self.seconds_per_step.items())


class Observer(TrainerCallback):
    """It measures, after every tenth of the run and after the cuts, what the model can do and how its states rank.

    Args:
        measure: model → numbers by name.
        batches: the batches on which states are ranked, always the same.
    """

    def __init__(self, measure, batches: list[dict]):
        self.measure, self.batches = measure, batches
        self.monitor, self.curve = StateMonitor(), []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % max(1, state.max_steps // OBSERVATIONS):
            return
        config = CompreSSMConfig(tolerance=0.5, calibration_batches=len(self.batches))
        seen = self.monitor.observe(state_layers(model), self.batches, config, state.global_step, draws=2)
        self.curve.append(
            {
                "step": state.global_step,
                "state_sizes": seen.state_sizes,
                "scores": [layer.tolist() for layer in seen.scores],
                "hankel_singular_values": [layer.tolist() for layer in seen.hankel_singular_values],
                "rank_noise": seen.rank_noise,
                "movement": seen.movement,
                "weyl_bound": seen.weyl_bound,
            }
            | self.measure(model)
        )


class Probe(TrainerCallback):
    """It measures often what the model can do, and at a cut before it and after; so it precedes what cuts.

    Args:
        measure: model → numbers by name, quickly.
    """

    def __init__(self, measure):
        self.measure, self.curve = measure, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.curve and max(state_sizes(model).values()) < self.curve[-1]["state_size"]:
            self.look(state, model)  # what came after the last step was a cut

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % max(1, state.max_steps // PROBES) == 0:
            self.look(state, model)

    def look(self, state, model) -> None:
        size = max(state_sizes(model).values())
        self.curve.append({"step": state.global_step, "state_size": size} | self.measure(model))


class Regrowth(TrainerCallback):
    """It gives every layer more states, which can learn, as `Recipe.grown` says, after the cuts.

    Args:
        batches: the batches on which scores are measured.
        schedule: the schedule of the cuts, before whose end nothing is grown.
    """

    def __init__(self, grown: tuple[float | str, int], batches: list[dict], schedule: dict, seed: int):
        self.moment, self.size = grown
        self.batches, self.start = batches, schedule.get("end", 0.0)
        self.monitor, self.generator, self.growths = StateMonitor(), torch.Generator().manual_seed(seed), []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        size = max(state_sizes(model).values())
        target = min(2 * size, self.size) if self.moment == WHEN_FLAT else self.size
        if target > size and self.is_due(state, model):
            grow_state(model, target, optimizer, self.generator)
            self.growths.append({"step": state.global_step, "state_size": target})

    def is_due(self, state, model) -> bool:
        """Say whether this is the moment; flatness is measured 20 times a run at most."""
        if self.moment != WHEN_FLAT:
            return state.global_step == round(self.moment * state.max_steps)
        is_time = state.global_step % max(1, state.max_steps // (2 * OBSERVATIONS)) == 0
        is_after = state.global_step > round(self.start * state.max_steps)
        return is_time and is_after and self.is_flat(model)

    def is_flat(self, model) -> bool:
        """Say whether no layer has states to spare: exp of the entropy of its scores comes near their number."""
        config = CompreSSMConfig(tolerance=0.5, calibration_batches=len(self.batches))
        scores = self.monitor.observe(state_layers(model), self.batches, config, 0, draws=1).scores
        return all(effective_number(layer) >= FLAT * len(layer) for layer in scores)


def effective_number(scores: torch.Tensor) -> float:
    """Return how many equal scores would have the entropy of these, (N,): between 1 and N."""
    return float(torch.distributions.Categorical(scores.double()).entropy().exp())


class Afresh(TrainerCallback):
    """It starts parts anew after every cut, as a model of the small size would."""

    def __init__(self, parts: tuple[str, ...], seed: int):
        self.parts, self.generator, self.size = parts, torch.Generator().manual_seed(seed), None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.size = max(state_sizes(model).values())

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if max(state_sizes(model).values()) != self.size:
            start_afresh(model, self.parts, optimizer, self.generator)


def trained(
    recipe: Recipe,
    training: dict,
    model: PreTrainedModel,
    data: Sequences,
    measure,
    seed: int,
    folder: Path,
    probe=None,
    observers: tuple[TrainerCallback, ...] | None = None,
) -> dict:
    """Train the model as the recipe says, and return what came out, as JSON types.

    Args:
        training: options of TrainingArguments, the same for all runs of a study.
        measure: model → numbers by name.
        probe: the same, to be measured often, or None.
        observers: what else watches, after the cuts; by default an `Observer`, whose curve comes with the result.
    """
    install_scan()
    stopwatch = Stopwatch()
    batches = ranking_batches(data, training)
    shrink, regrowth, callbacks = None, None, [stopwatch]
    if probe is not None:
        callbacks.append(probe := Probe(probe))
    if recipe.reduction is not None:
        config = CompreSSMConfig(**recipe.reduction, calibration_seed=seed)
        callbacks.append(shrink := CompreSSMCallback(config, schedule_of(recipe)))
    if recipe.grown is not None:
        callbacks.append(regrowth := Regrowth(recipe.grown, batches, recipe.schedule, seed))
    if recipe.afresh:
        callbacks.append(Afresh(recipe.afresh, seed))
    observers = (Observer(measure, batches),) if observers is None else observers
    callbacks += observers
    trainer = StudyTrainer(
        model=model,
        args=arguments_of(recipe, training, seed, folder),
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    events = shrink.history.events if shrink else []
    if shrink and recipe.grown is None:  # what has grown since, the record of cuts knows nothing of
        model.save_pretrained(folder / "model")
        save_history(shrink.history, folder / "model")
    cutting = sum(event.seconds for event in events)
    return {
        "layers": list(state_sizes(model)),  # every list with an entry for each layer has these, in this order
        "state_sizes": list(state_sizes(model).values()),
        "seconds": stopwatch.seconds + cutting,
        "cutting_seconds": cutting,
        "seconds_per_step": stopwatch.seconds_per_step,
        "cuts": [
            {"step": e.step, "state_sizes": e.state_sizes_after, "rise": e.loss_after - e.loss_before} for e in events
        ],
        "growths": regrowth.growths if regrowth else [],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "curve": [point for observer in observers if isinstance(observer, Observer) for point in observer.curve],
    } | ({"probes": probe.curve} if probe else {})


def ranking_batches(data: Sequences, training: dict) -> list[dict]:
    """Return the batches on which states are ranked."""
    size = training["per_device_train_batch_size"]
    return Sequences(**data[: RANKING_BATCHES * size]).batches(size)


def schedule_of(recipe: Recipe) -> CompreSSMSchedule:
    """Return the schedule; the observer measures, but the trigger "settled" does so for itself, 40 times a run."""
    waits = {"monitor_steps": max(1, recipe.steps // 40)} if recipe.schedule.get("trigger") == "settled" else {}
    return CompreSSMSchedule(**recipe.schedule, **waits)


def arguments_of(recipe: Recipe, training: dict, seed: int, folder: Path) -> TrainingArguments:
    """Return arguments with a warm-up over a twentieth of the steps, then a cosine to zero, or several."""
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_restarts",
        lr_scheduler_kwargs={"num_cycles": recipe.cycles},
        warmup_steps=0.05,
        weight_decay=0.1,
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, recipe.steps // 20),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **training,
    )
