"""This study times a whole model's step: by scan, before and after a cut, and what analysis and surgery add."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, analyze, compress, install_scan, parameter_groups, uninstall_scan
from hf_compressm.architectures import state_sizes
from hf_compressm.kernels.dispatch import VARIABLE

from .family import Family, Shape
from .measuring import (
    SHARE,
    Limits,
    Work,
    added_peaks,
    mebibytes,
    median,
    ratio_quartiles,
    show,
    table,
    time_in_turn,
    timed,
)
from .scan import compared, time_cells, time_header

EVENTS = 4
UNCUT, BUILT = "uncut", "built"


class Training:
    """It trains a model of the family with AdamW on random tokens.

    Args:
        scan: one of the family's `training_scans`; None for the fastest that there is.
    """

    def __init__(self, family: Family, size: int, scan: str | None = None):
        self.args, self.scan = family.args, scan
        self.by_transformers = scan in family.of_transformers
        self.model = family.build(size, **family.of_transformers.get(scan, {})).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, weight_decay=0.1), lr=1e-3)
        shape = family.shape.batch, family.shape.length
        self.batch = torch.randint(self.args.vocab_size, shape, device=self.args.device)

    def step(self) -> None:
        half = torch.autocast("cuda", torch.bfloat16) if self.args.device == "cuda" else nullcontext()
        with scan_chosen(self.scan, self.by_transformers):
            with half:
                loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cut(self, size: int, basis: str = "axis") -> dict[str, float]:
        """Cut to `size` states after a step, which fills the optimizer, and return the seconds of the parts."""
        self.step()
        config = CompreSSMConfig(target_state_size=size, basis=basis)
        batches = [{"input_ids": self.batch, "labels": self.batch}] * config.calibration_batches
        with torch.autocast("cuda", torch.bfloat16, enabled=self.args.device == "cuda"):
            report = analyze(self.model, batches, config)
        surgery = timed(lambda: compress(self.model, report, self.optimizer), self.args.device)
        return {
            "analysis": report.seconds - report.measuring_seconds,
            "measuring": report.measuring_seconds,
            "surgery": surgery,
        }


@contextmanager
def scan_chosen(name: str | None, by_transformers: bool) -> Iterator[None]:
    """Let models run this scan within the block: one of Transformers' own, or what the environment names."""
    before = os.environ.get(VARIABLE)
    if by_transformers:
        uninstall_scan()
    elif name is not None:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        install_scan()
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def study_training(family: Family, limits: Limits) -> dict:
    return {
        "step": [study_step(family, size, limits) for size in family.step_sizes],
        "cut": study_cut(family, limits),
        "run": study_run(family),
    }


def study_step(family: Family, size: int, limits: Limits) -> dict:
    """Time the same step with one scan and another."""
    names = family.training_scans
    print(f"Training step of a {family.title} at N = {size}: {', '.join(names)}", flush=True)
    trainings = {name: Training(family, size, name) for name in names}
    runs = {name: training.step for name, training in trainings.items()}
    seconds = time_in_turn(runs, family.args.rounds, family.args)
    least = least_step_seconds(family, trainings[names[0]].model, limits)
    return {"N": size} | compared(seconds, least)


def study_cut(family: Family, limits: Limits) -> dict:
    """Time the step of models that were cut in each basis, of the uncut one, and of one built at the small size."""
    before, after = family.shape.state_size, family.size_after
    print(f"Training step of a {family.title}, cut {before} → {after}, uncut, and built at {after}", flush=True)
    trainings = {UNCUT: Training(family, before)}
    for basis in family.bases:
        trainings[basis] = Training(family, before)
        trainings[basis].cut(after, basis)
    trainings[BUILT] = Training(family, after)
    runs = {name: training.step for name, training in trainings.items()}
    seconds = time_in_turn(runs, 2 * family.args.rounds, family.args)
    medians = {name: median(values) for name, values in seconds.items()}
    tokens = family.shape.batch * family.shape.length
    return {
        "sizes": [before, after],
        "bases": list(family.bases),
        "median_seconds": medians,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "ratio_to_built_quartiles": {name: ratio_quartiles(seconds[name], seconds[BUILT]) for name in runs},
        "uncut_to_it_quartiles": {name: ratio_quartiles(seconds[UNCUT], seconds[name]) for name in runs},
        "peak_bytes": added_peaks(runs, family.args.device),
        "share_of_limit": {
            name: least_step_seconds(family, training.model, limits) / medians[name]
            for name, training in trainings.items()
        },
        "seconds": seconds,
    }


def least_step_seconds(family: Family, model: PreTrainedModel, limits: Limits) -> float:
    """Return the least time of a step: the scans, and each weight in three products of matrices and in AdamW.

    AdamW reads a weight, its gradient and two moments and writes all but the gradient; before, two passes read the
    weight and one writes the gradient. Convolutions, norms and activations are left out.
    """
    shape, weights = family.shape, number_of_weights(model)
    dtype = torch.bfloat16 if family.args.device == "cuda" else torch.float32
    layers = [Shape(shape.batch, shape.length, shape.channels, size) for size in state_sizes(model).values()]
    scans = [family.least_work(layer, dtype) for layer in layers]
    work = Work(
        bytes_=sum(scan.bytes_ for scan in scans) + 10 * 4 * weights,
        flops=sum(scan.flops for scan in scans),
        matrix_flops=sum(scan.matrix_flops for scan in scans) + 3 * 2 * weights * shape.batch * shape.length,
    )
    return limits.seconds(work)


def number_of_weights(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def study_run(family: Family) -> dict:
    """Time the steps and the events of a run that is cut four times in its first tenth, by equal factors."""
    args = family.args
    first, last = args.run_sizes
    print(f"Analysis and surgery of a run of a {family.title}, {args.run_steps} steps, {first} → {last}", flush=True)
    training = Training(family, first)
    training.cut(first)  # warms up
    sizes = [round(first * (last / first) ** (i / EVENTS)) for i in range(EVENTS + 1)]
    events, steps = [], []
    for size in sizes[1:]:
        steps.append(median([timed(training.step, args.device) for _ in range(args.rounds)]))
        events.append(training.cut(size))
    steps.append(median([timed(training.step, args.device) for _ in range(args.rounds)]))
    tenth = args.run_steps / 10
    seconds_of_steps = sum(tenth / EVENTS * step for step in steps[:-1]) + (args.run_steps - tenth) * steps[-1]
    totals = {part: sum(event[part] for event in events) for part in events[0]}
    return {
        "sizes": sizes,
        "seconds_per_step": steps,
        "events": events,
        "seconds_of_steps": seconds_of_steps,
        "share": {part: total / (seconds_of_steps + sum(totals.values())) for part, total in totals.items()},
    }


def training_tables(family: Family, result: dict) -> str:
    shape, layers = family.shape, family.args.num_hidden_layers
    text = "### Training step\n\n"
    text += f"{layers} layers of width {shape.channels // 2}, batch {shape.batch}, L {shape.length}\n\n"
    rows = [
        [str(point["N"]), name, *time_cells(point, name)]
        for point in result["step"]
        for name in point["median_seconds"]
    ]
    text += table(["N", "scan", *time_header(next(iter(result["step"][0]["median_seconds"])))], rows)

    cut, run = result["cut"], result["run"]
    before, after = cut["sizes"]
    labels = {UNCUT: f"N = {before}"} | {basis: f"cut {before} → {after}, {basis}" for basis in cut["bases"]}
    labels[BUILT] = f"built at {after}"
    rows = [
        [
            label,
            f"{1000 * cut['median_seconds'][name]:.1f}",
            f"{cut['tokens_per_second'][name]:,.0f}",
            show(cut["ratio_to_built_quartiles"][name], 3),
            show(cut["uncut_to_it_quartiles"][name]),
            mebibytes(cut["peak_bytes"][name]),
            f"{cut['share_of_limit'][name]:.1%}",
        ]
        for name, label in labels.items()
    ]
    header = ["", "ms per step", "tokens per second", f"× built at {after}", f"N = {before} / it"]
    text += "\n### After a cut\n\n" + table([*header, "peak memory of a step, MiB", SHARE], rows)
    shares, sizes = run["share"], " → ".join(map(str, run["sizes"]))
    text += "\n### Analysis and surgery\n\n"
    text += f"Four cuts, {sizes}, of a run whose steps take {run['seconds_of_steps']:.0f} s: "
    text += f"analysis and surgery {shares['analysis'] + shares['surgery']:.2%} of it, "
    text += f"measuring losses before and after {shares['measuring']:.2%}.\n"
    return text
