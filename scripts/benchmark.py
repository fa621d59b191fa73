"""This benchmark times what it compares in turn, in one process, and compares the ratios within each round.

    python scripts/benchmark.py                # all, about ten minutes on two idle CPU cores
    python scripts/benchmark.py mamba scan --state_size 64
    python scripts/benchmark.py --device cuda  # sizes of mamba-130m and mamba2-130m, less than ten minutes

`scan` times forward and backward of a scan and their peak memory, by N and L, after checking that all gradients
agree: this package's against mamba-ssm (on a GPU, where it is installed) and, for `mamba`, mambapy and Transformers'
loop; for `mamba2` Transformers' own scan, mamba-scan-lite (where it is installed) and the recurrence step by step.
`training` times the step of a model with each scan, the step after a cut in each basis against that of a model built
at that size, and what analysis adds. `throughput` times the step by N, `decoding` generation.

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
from benchmarks.mamba1_family import Mamba1
from benchmarks.mamba2_family import Mamba2
from benchmarks.measuring import machine, measure_limits, prepare, table
from benchmarks.scan import scan_tables, study_scan
from benchmarks.throughput import study_throughput, throughput_tables
from benchmarks.training import study_training, training_tables
from transformers import HfArgumentParser

FAMILIES = {"mamba": Mamba1, "mamba2": Mamba2}
STUDIES = {
    "scan": (study_scan, scan_tables),
    "training": (study_training, training_tables),
    "throughput": (study_throughput, throughput_tables),
    "decoding": (study_decoding, decoding_tables),
}


def main() -> None:
    args, families, studies = parse_arguments(sys.argv[1:])
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
    measured = [FAMILIES[name](args) for name in families]
    for family in measured:
        results[family.model_type] = {}
        text += f"\n## {family.title}\n"
        for name in studies:
            study, tables = STUDIES[name]
            results[family.model_type][name] = study(family, limits)
            text += "\n" + tables(family, results[family.model_type][name])

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "benchmark.md").write_text(text)
    draw(results, measured).savefig(folder / "benchmark.png")
    print(f"\n{text}\nWritten to {folder}")


def parse_arguments(argv: list[str]) -> tuple[Arguments, list[str], list[str]]:
    """Return the options, with sizes that suit the device, the families and the studies; all where none is named."""
    parser = HfArgumentParser(Arguments)
    text = f"What to measure: of {', '.join(FAMILIES)}, and of {', '.join(STUDIES)}; all where none of a kind is named"
    parser.add_argument("what", nargs="*", choices=[*FAMILIES, *STUDIES, []], help=text)
    device = parser.parse_known_args(argv)[0].device
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r}; allowed: cpu, cuda.")
    parser.set_defaults(**(ON_CUDA if device == "cuda" else {}))
    args, named = parser.parse_args_into_dataclasses(argv)
    families, studies = ([name for name in kind if name in named.what] or list(kind) for kind in (FAMILIES, STUDIES))
    return args, families, studies


if __name__ == "__main__":
    main()
