"""This benchmark times what it compares in turn, in one process, and compares the ratios within each round.

    python scripts/benchmark.py                # all studies, about seven minutes on two idle CPU cores
    python scripts/benchmark.py scan --state_size 64
    python scripts/benchmark.py --device cuda  # sizes of mamba-130m, less than ten minutes

`scan` times forward and backward of a selective scan and their peak memory, by N and L: this package's scans against
mamba-ssm (on a GPU, where it is installed), mambapy and Transformers' loop, after checking that all gradients agree.
`training` times the step of a model with each scan, the step after a cut against that of a model built at that size,
and what analysis adds. `decoding` times generation by N. `mamba2` times the scan of Mamba-2, and a training step with
it, against Transformers' own.

It writes benchmark.json, benchmark.md and benchmark.png. A share of the limit is that of the time which the least
bytes and the arithmetic would take at the speed of a large copy and a large product of matrices on this machine.
"""

import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from benchmarks.arguments import ON_CUDA, Arguments
from benchmarks.decoding import decoding_tables, study_decoding
from benchmarks.figures import draw
from benchmarks.mamba2 import mamba2_tables, study_mamba2
from benchmarks.measuring import machine, measure_limits, prepare, table
from benchmarks.scan import scan_tables, study_scan
from benchmarks.training import study_training, training_tables
from transformers import HfArgumentParser

STUDIES = ("scan", "training", "decoding", "mamba2")


def main() -> None:
    args, studies = parse_arguments(sys.argv[1:])
    prepare(args)
    found = machine(args)
    if found["load_average"] > 0.5:
        print("This machine was busy in the last minute; on one that is, these times mean little.")
    results = {"date": datetime.now().isoformat(timespec="seconds"), "machine": found, "options": asdict(args)}
    text = "# Benchmark\n\n" + table(["machine", ""], [[name, str(value)] for name, value in found.items()])

    limits = measure_limits(args.device)
    results["limits"] = asdict(limits)
    rates = limits.flops_per_second / 1e9, limits.matrix_flops_per_second / 1e9
    text += f"\nAt best {limits.bytes_per_second / 1e9:.0f} GB/s, {rates[0]:,.0f} GFLOP/s in float32, "
    text += f"{rates[1]:,.0f} in a model's products of matrices.\n"
    if "scan" in studies:
        results["scan"] = study_scan(args, limits)
        text += "\n" + scan_tables(results["scan"])
    if "training" in studies:
        results["training"] = study_training(args, limits)
        text += "\n" + training_tables(results["training"])
    if "decoding" in studies:
        results["decoding"] = study_decoding(args, limits)
        text += "\n" + decoding_tables(results["decoding"])
    if "mamba2" in studies:
        results["mamba2"] = study_mamba2(args, limits)
        text += "\n" + mamba2_tables(results["mamba2"], args)

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "benchmark.md").write_text(text)
    draw(results).savefig(folder / "benchmark.png")
    print(f"\n{text}\nWritten to {folder}")


def parse_arguments(argv: list[str]) -> tuple[Arguments, list[str]]:
    """Return the options, with sizes that suit the device, and the studies; all of them if none is named."""
    parser = HfArgumentParser(Arguments)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], help="What to measure: " + ", ".join(STUDIES))
    device = parser.parse_known_args(argv)[0].device
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r}; allowed: cpu, cuda.")
    parser.set_defaults(**(ON_CUDA if device == "cuda" else {}))
    args, selected = parser.parse_args_into_dataclasses(argv)
    return args, selected.studies or list(STUDIES)


if __name__ == "__main__":
    main()
