"""This study times a whole model's step: by scan, before and after a cut, and what analysis and surgery add."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from transformers import MambaConfig, MambaForCausalLM

from hf_compressm import CompreSSMConfig, analyze, compress, install_scan, parameter_groups, uninstall_scan
from hf_compressm.architectures.installed_scan import kernel_in_force
from hf_compressm.kernels.dispatch import VARIABLE

from .arguments import Arguments
from .measuring import SHARE, Limits, added_peak, mebibytes, median, ratio_quartiles, show, table, time_in_turn, timed
from .scan import FLOPS, least_bytes

MAMBAPY = "mambapy"
OWN = "Transformers' own"  # without our scans
EVENTS = 4


class Training:
    """It trains a Mamba with AdamW on random tokens, and starts with a few steps.

    Args:
        scan: "torch", "cpp", "triton", "mamba_ssm" or "mambapy"; None for the fastest that there is.
    """

    def __init__(self, args: Arguments, size: int, scan: str | None = None):
        self.args, self.scan = args, scan
        self.model = build_model(args, size, use_mambapy=scan == MAMBAPY).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, weight_decay=0.1), lr=1e-3)
        shape = args.batch_size, args.block_size
        self.batch = torch.randint(args.vocab_size, shape, device=args.device)
        for _ in range(3):
            self.step()

    def step(self) -> None:
        half = torch.autocast("cuda", torch.bfloat16) if self.args.device == "cuda" else nullcontext()
        with scan_chosen(self.scan):
            with half:
                loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cut(self, size: int) -> dict[str, float]:
        """Cut to `size` states, and return the seconds of the parts."""
        config = CompreSSMConfig(target_state_size=size)
        batches = [{"input_ids": self.batch}] * config.calibration_batches
        with torch.autocast("cuda", torch.bfloat16, enabled=self.args.device == "cuda"):
            report = analyze(self.model, batches, config)
        surgery = timed(lambda: compress(self.model, report, self.optimizer), self.args.device)
        return {
            "analysis": report.seconds - report.measuring_seconds,
            "measuring": report.measuring_seconds,
            "surgery": surgery,
        }


def build_model(args: Arguments, size: int, use_mambapy: bool = False) -> MambaForCausalLM:
    config = MambaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        state_size=size,
        use_mambapy=use_mambapy,
    )
    return MambaForCausalLM(config).to(args.device)


@contextmanager
def scan_chosen(name: str | None) -> Iterator[None]:
    """Let models run this scan within the block; mambapy is one of Transformers' own."""
    before = os.environ.get(VARIABLE)
    if name in (MAMBAPY, OWN):
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


def study_training(args: Arguments, limits: Limits) -> dict:
    return {"step": study_step(args, limits), "cut": study_cut(args, limits), "run": study_run(args)}


def study_step(args: Arguments, limits: Limits) -> dict:
    """Time the same step with one scan and another."""
    names = {"cpu": ["cpp", "torch", MAMBAPY], "cuda": ["triton", "torch"]}[args.device]
    names += ["mamba_ssm"] * (kernel_in_force(args.device) == "mamba_ssm")
    print(f"Training step at N = {args.step_size}: {', '.join(names)}", flush=True)
    trainings = {name: Training(args, args.step_size, name) for name in names}
    rounds = {name: args.slow_rounds if name == MAMBAPY else args.rounds for name in names}
    seconds = time_in_turn({name: training.step for name, training in trainings.items()}, rounds, args.device)
    medians = {name: median(values) for name, values in seconds.items()}
    least = least_step_seconds(trainings[names[0]].model, args, limits)
    return {
        "state_size": args.step_size,
        "median_seconds": medians,
        "share_of_limit": {name: least / value for name, value in medians.items()},
        "ratio_quartiles": {name: ratio_quartiles(values, seconds[names[0]]) for name, values in seconds.items()},
        "ratio_to_torch_quartiles": {n: ratio_quartiles(values, seconds["torch"]) for n, values in seconds.items()},
        "seconds": seconds,
    }


def study_cut(args: Arguments, limits: Limits) -> dict:
    """Time the step of a model that was cut, of the uncut one, and of one that was built at the small size."""
    before, after = args.size_before, args.size_after
    print(f"Training step, cut {before} → {after}, uncut, and built at {after}", flush=True)
    trainings = {"uncut": Training(args, before), "cut": Training(args, before), "built": Training(args, after)}
    trainings["cut"].cut(after)
    for training in trainings.values():
        training.step()  # warms up at the new size
    runs = {name: training.step for name, training in trainings.items()}
    seconds = time_in_turn(runs, dict.fromkeys(runs, 2 * args.rounds), args.device)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "sizes": [before, after],
        "median_seconds": medians,
        "tokens_per_second": {name: args.batch_size * args.block_size / value for name, value in medians.items()},
        "cut_to_built_quartiles": ratio_quartiles(seconds["cut"], seconds["built"]),
        "uncut_to_cut_quartiles": ratio_quartiles(seconds["uncut"], seconds["cut"]),
        "peak_bytes": {name: added_peak(training.step, args.device) for name, training in trainings.items()},
        "share_of_limit": {
            name: least_step_seconds(training.model, args, limits) / medians[name]
            for name, training in trainings.items()
        },
        "seconds": seconds,
    }


def least_step_seconds(model: MambaForCausalLM, args: Arguments, limits: Limits) -> float:
    """Return the least time of a step: the scans, and each weight in three products of matrices and in AdamW.

    AdamW reads a weight, its gradient and two moments and writes all but the gradient; before, two passes read the
    weight and one writes the gradient. Convolutions, norms and activations are left out.
    """
    config, weights = model.config, sum(parameter.numel() for parameter in model.parameters())
    layers, channels, size = config.num_hidden_layers, config.intermediate_size, config.state_size
    tokens = args.batch_size * args.block_size
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    one_scan = replace(args, length=args.block_size, channels=channels, dtype=dtype)
    return limits.seconds(
        bytes_=layers * least_bytes(one_scan, size) + 10 * 4 * weights,
        flops=layers * FLOPS * tokens * channels * size,
        matrix_flops=3 * 2 * weights * tokens,
    )


def study_run(args: Arguments) -> dict:
    """Time the steps and the events of a run that is cut four times in its first tenth, by equal factors."""
    first, last = args.step_size, args.run_size
    print(f"Analysis and surgery of a run of {args.run_steps} steps, {first} → {last}", flush=True)
    training = Training(args, first)
    training.cut(first)  # warms up
    sizes = [round(first * (last / first) ** (i / EVENTS)) for i in range(EVENTS + 1)]
    events, steps = [], []
    for size in sizes[1:]:
        steps.append(median([timed(training.step, args.device) for _ in range(args.rounds)]))
        events.append(training.cut(size))
    training.step()
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


def training_tables(result: dict) -> str:
    step, cut, run = result["step"], result["cut"], result["run"]
    first = next(iter(step["median_seconds"]))
    text = f"## Training step, N = {step['state_size']}\n\n"
    rows = [
        [name, f"{1000 * seconds:.1f}", show(step["ratio_quartiles"][name]), f"{step['share_of_limit'][name]:.1%}"]
        for name, seconds in step["median_seconds"].items()
    ]
    text += table(["scan", "ms", f"× {first}", SHARE], rows)
    before, after = cut["sizes"]
    labels = {"uncut": f"N = {before}", "cut": f"cut {before} → {after}", "built": f"built at {after}"}
    rows = [
        [
            label,
            f"{1000 * cut['median_seconds'][name]:.1f}",
            f"{cut['tokens_per_second'][name]:,.0f}",
            mebibytes(cut["peak_bytes"][name]),
            f"{cut['share_of_limit'][name]:.1%}",
        ]
        for name, label in labels.items()
    ]
    header = ["", "ms per step", "tokens per second", "peak memory of a step, MiB", SHARE]
    text += "\n## After a cut\n\n" + table(header, rows)
    text += f"\ncut / built: {show(cut['cut_to_built_quartiles'], 3)}, "
    text += f"uncut / cut: {show(cut['uncut_to_cut_quartiles'])}\n"
    shares, sizes = run["share"], " → ".join(map(str, run["sizes"]))
    text += "\n## Analysis and surgery\n\n"
    text += f"Four cuts, {sizes}, of a run whose steps take {run['seconds_of_steps']:.0f} s: "
    text += f"analysis and surgery {shares['analysis'] + shares['surgery']:.2%} of it, "
    text += f"measuring losses before and after {shares['measuring']:.2%}.\n"
    return text
