"""This benchmark times what the theory costs: the analysis of Linear Recurrent Units, and Hankel regularisation.

    python scripts/benchmark_analysis.py                 # both, two minutes on two CPU cores
    python scripts/benchmark_analysis.py analysis --state_sizes 64 128 256
    python scripts/benchmark_analysis.py regulariser --device cuda

`analysis` times one `analyze` of a 6-layer model, from its weights alone, against N, and takes its peak memory at
N = 384. `regulariser` times a training step with and without the Hankel nuclear norm in the loss, computed in three
ways (as it is written down, with the Gramians in closed form, and by this package), against four cuts in the first
tenth of the run and the steps of the small model after them. What is compared runs in turn, in one process.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from benchmarks.measuring import added_peak, mebibytes, timed
from matplotlib.figure import Figure
from torch import Tensor

from hf_compressm import CompreSSMConfig, LRUConfig, LRUForSequenceClassification, analyze, compress
from hf_compressm.architectures import state_layers
from hf_compressm.plotting import save_figure
from hf_compressm.storage.files import write_aside
from hf_compressm.theory.hankel import diagonal_gramians, hankel_nuclear_norm

WEIGHT = 1e-3  # of the regulariser; its cost does not depend on it


def norm_as_written(eigenvalues: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return Σ sqrt(eig(P Q)) with both Lyapunov equations solved for a dense A, all of it differentiable."""
    A = torch.diag(eigenvalues)
    P, Q = _lyapunov(A, B @ B.mH), _lyapunov(A.mH, C.mH @ C)
    return torch.linalg.eigvals(P @ Q).real.clamp_min(1e-12).sqrt().sum()


def norm_with_closed_gramians(eigenvalues: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return Σ sqrt(eig(P Q)) with the Gramians of a diagonal system in closed form."""
    P, Q = diagonal_gramians(eigenvalues, B, C)
    return torch.linalg.eigvals(P @ Q).real.clamp_min(1e-12).sqrt().sum()


def _lyapunov(A: Tensor, right_side: Tensor) -> Tensor:
    """Solve X = A X Aᴴ + right_side by doubling, differentiably; 16 doublings reach |λ| = 0.999."""
    for _ in range(16):
        right_side, A = right_side + A @ right_side @ A.mH, A @ A
    return right_side


NORMS = {
    "as written": norm_as_written,
    "closed-form Gramians": norm_with_closed_gramians,
    "closed form and gradient (this package)": hankel_nuclear_norm,
}


def build(layers: int, hidden_size: int, state_size: int, device: str) -> LRUForSequenceClassification:
    """Build a model with random weights, on which the cost does not depend."""
    torch.manual_seed(0)
    config = LRUConfig(num_hidden_layers=layers, hidden_size=hidden_size, state_size=state_size, num_labels=10)
    return LRUForSequenceClassification(config).to(device)


def study_analysis(options: argparse.Namespace) -> dict:
    """Return the seconds of one `analyze` by N."""
    seconds, config = {}, CompreSSMConfig(tolerance=0.1)
    peak = added_peak(partial(analyze, build(6, 512, 384, "cpu"), None, config), "cpu")
    print(f"6 layers, N = 384: {mebibytes(peak)} MiB at the peak of an analysis on the CPU, beyond what there was")
    for size in options.state_sizes:
        analyze(build(1, 512, size, options.device), None, config)  # warms up
        run = partial(analyze, build(6, 512, size, options.device), None, config)
        seconds[size] = median(timed(run, options.device) for _ in range(3))
        print(f"6 layers, N = {size:4d}: {seconds[size]:7.2f} s per analysis", flush=True)
    return {"seconds": seconds, "peak_bytes": peak}


def study_regulariser(options: argparse.Namespace) -> dict:
    """Return seconds per training step with each regulariser and after a reduction, and those of whole runs."""
    runs = {"full size": Training(options, options.state_size, None)}
    runs |= {f"nuclear norm, {name}": Training(options, options.state_size, norm) for name, norm in NORMS.items()}
    reduced = f"reduced to N = {options.reduced_size}"
    runs[reduced] = Training(options, options.reduced_size, None)

    seconds = {name: [] for name in runs}
    for i in range(options.rounds + 1):  # the first round warms up
        for name, training in runs.items():
            took = timed(training.step, options.device)
            if i:
                seconds[name].append(took)
    per_step = {name: median(values) for name, values in seconds.items()}
    cuts = 4 * median(timed(lambda: one_event(options), options.device) for _ in range(3))
    whole = {name: options.steps * step for name, step in per_step.items()}
    whole[reduced] = 0.1 * whole["full size"] + 0.9 * whole[reduced] + cuts  # cuts in the first tenth

    print(f"1 layer, N = {options.state_size}, H = 8, L = {options.length}, batch 50, {options.steps:,} steps")
    print("| | a step, ms | a run, h | relative |\n|---|---|---|---|")
    for name in runs:
        relative = whole[name] / whole["full size"]
        print(f"| {name} | {1000 * per_step[name]:.0f} | {whole[name] / 3600:.2f} | {relative:.2f} |")
    print(f"The four cuts themselves: {cuts:.2f} s.")
    return {"seconds_per_step": per_step, "seconds_of_four_cuts": cuts, "seconds_of_a_run": whole}


class Training:
    """It trains one block of width 8 on random sequences, with a regulariser in the loss or none."""

    def __init__(self, options: argparse.Namespace, state_size: int, norm: Callable | None):
        self.model, self.norm = build(1, 8, state_size, options.device), norm
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.values = torch.rand(50, options.length, 1, device=options.device)
        self.labels = torch.randint(10, (50,), device=options.device)

    def step(self) -> None:
        loss = self.model(input_values=self.values, labels=self.labels).loss
        if self.norm is not None:
            norms = sum(self.norm(*mixer.system()) for mixer in state_layers(self.model).values())
            loss = loss + WEIGHT * norms.to(loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def one_event(options: argparse.Namespace) -> None:
    """Run analysis and surgery, without any loss measured."""
    model = build(1, 8, options.state_size, options.device)
    optimizer = torch.optim.AdamW(model.parameters())
    compress(model, analyze(model, None, CompreSSMConfig(tolerance=0.02)), optimizer)


def plot_cost(seconds: dict[int, float]) -> Figure:
    """Draw the time of an analysis against N, both logarithmic, with the slope of N³ beside it."""
    figure = Figure(figsize=(5, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted(seconds)
    axes.loglog(sizes, [seconds[size] for size in sizes], "o-", label="analysis of 6 layers")
    last = sizes[-1]
    axes.loglog(sizes, [seconds[last] * (size / last) ** 3 for size in sizes], "--", color="grey", label="∝ N³")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("state size N")
    axes.set_ylabel("time (s)")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=["analysis", "regulariser", "both"], default="both")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--state_sizes", type=int, nargs="+", default=[32, 64, 128, 256, 384, 512, 1024])
    parser.add_argument("--state_size", type=int, default=256, help="regulariser: N")
    parser.add_argument("--reduced_size", type=int, default=28, help="regulariser: N after the cuts")
    parser.add_argument("--length", type=int, default=784, help="regulariser: sequence length L")
    parser.add_argument(
        "--steps", type=int, default=200_000, help="regulariser: steps of the whole run, the paper's sMNIST"
    )
    parser.add_argument("--rounds", type=int, default=5, help="regulariser: timed steps of each kind")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark_analysis"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    if options.study in ("analysis", "both"):
        results["analysis"] = study_analysis(options)
        save_figure(plot_cost(results["analysis"]["seconds"]), options.output_dir / "analysis.png")
    if options.study in ("regulariser", "both"):
        results["regulariser"] = study_regulariser(options)
    write_aside(
        options.output_dir / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n")
    )
    print(f"\nWritten to {options.output_dir}")


if __name__ == "__main__":
    main()
