"""This study times generation, a token at a time, by state size: this package's step against Transformers'."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from hf_compressm import install_scan, uninstall_scan

from .arguments import Arguments
from .measuring import SHARE, Limits, median, ratio_quartiles, show, table, time_in_turn
from .training import build_model


def study_decoding(args: Arguments, limits: Limits) -> list[dict]:
    results = []
    for size in args.decode_sizes:
        for batch in (1, args.batch_size):
            print(f"Generation, batch = {batch}, N = {size}", flush=True)
            results.append(decoding_point(args, size, batch, limits))
    return results


@torch.no_grad()
def decoding_point(args: Arguments, size: int, batch: int, limits: Limits) -> dict:
    model = build_model(args, size).eval()
    prompt = torch.randint(args.vocab_size, (batch, 16), device=args.device)
    output = model(prompt, use_cache=True)
    cache = "cache" if "cache" in output else "cache_params"  # as Transformers calls it from 5.24 on, and before
    token = prompt[:, -1:]

    def generate(with_scan) -> None:
        with with_scan():
            for _ in range(args.decode_tokens):
                model(token, **{cache: output[cache]}, use_cache=True)

    runs = {"hf_compressm": partial(generate, _installed), "Transformers": partial(generate, _uninstalled)}
    for run in runs.values():
        run()  # warms up
    seconds = time_in_turn(runs, dict.fromkeys(runs, args.rounds), args.device)
    medians = {name: median(values) for name, values in seconds.items()}
    bytes_of_state = 4 * batch * size * 2 * args.hidden_size * args.num_hidden_layers
    bytes_of_weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    # A token reads every weight once, for all sequences; it reads and writes the states.
    least = limits.seconds(bytes_of_weights + 2 * bytes_of_state, flops=2 * batch * bytes_of_weights / 4)
    return {
        "state_size": size,
        "batch": batch,
        "tokens_per_second": {name: batch * args.decode_tokens / value for name, value in medians.items()},
        "transformers_to_ours_quartiles": ratio_quartiles(seconds["Transformers"], seconds["hf_compressm"]),
        "bytes_of_state": bytes_of_state,
        "share_of_limit": args.decode_tokens * least / medians["hf_compressm"],
        "seconds": seconds,
    }


@contextmanager
def _installed() -> Iterator[None]:
    yield


@contextmanager
def _uninstalled() -> Iterator[None]:
    uninstall_scan()
    try:
        yield
    finally:
        install_scan()


def decoding_tables(results: list[dict]) -> str:
    rows = [
        [
            str(point["state_size"]),
            str(point["batch"]),
            f"{point['bytes_of_state'] / 2**20:.2f}",
            *(f"{value:,.0f}" for value in point["tokens_per_second"].values()),
            show(point["transformers_to_ours_quartiles"]),
            f"{point['share_of_limit']:.1%}",
        ]
        for point in results
    ]
    header = [
        "N",
        "batch",
        "state, MiB",
        "tokens per second",
        "with Transformers' step",
        "its time × ours",
        SHARE,
    ]
    return "## Generation\n\n" + table(header, rows)
