"""This study times generation, a token at a time, by state size: this package's step against Transformers'."""

from functools import partial

import torch

from .family import Family
from .measuring import SHARE, Limits, Work, median, ratio_quartiles, show, table, time_in_turn
from .training import number_of_weights, scan_chosen

OURS, TRANSFORMERS, GENERATE = "hf_compressm", "Transformers", "model.generate"


def study_decoding(family: Family, limits: Limits) -> list[dict]:
    results = []
    for size in family.args.decode_sizes:
        for batch in family.args.decode_batches:
            print(f"Generation by a {family.title}, batch = {batch}, N = {size}", flush=True)
            results.append(decoding_point(family, size, batch, limits))
    return results


@torch.no_grad()
def decoding_point(family: Family, size: int, batch: int, limits: Limits) -> dict:
    """Time forward passes with a cache, with our step and Transformers', and what `model.generate` makes of ours."""
    args, channels = family.args, family.shape.channels
    model = family.build(size).eval()
    prompt = torch.randint(args.vocab_size, (batch, 16), device=args.device)
    output = model(prompt, use_cache=True)
    cache = "cache" if "cache" in output else "cache_params"  # as Transformers calls it from 5.24 on, and before
    token = prompt[:, -1:]
    model.generation_config.eos_token_id = None  # no sequence ends early

    def step(by_transformers: bool) -> None:
        with scan_chosen(None, by_transformers):
            for _ in range(args.decode_tokens):
                model(token, **{cache: output[cache]}, use_cache=True)

    def generate() -> None:
        model.generate(token, max_new_tokens=args.decode_tokens, do_sample=False, pad_token_id=0)

    runs = {OURS: partial(step, False), TRANSFORMERS: partial(step, True), GENERATE: generate}
    seconds = time_in_turn(runs, args.rounds, args)
    medians = {name: median(values) for name, values in seconds.items()}
    bytes_of_state = 4 * batch * size * channels * args.num_hidden_layers
    weights = number_of_weights(model)
    # A token reads every weight once, for all sequences; it reads and writes the states.
    least = limits.seconds(Work(4 * weights + 2 * bytes_of_state, flops=2 * batch * weights))
    return {
        "N": size,
        "batch": batch,
        "tokens_per_second": {name: batch * args.decode_tokens / value for name, value in medians.items()},
        "transformers_to_ours_quartiles": ratio_quartiles(seconds[TRANSFORMERS], seconds[OURS]),
        "bytes_of_state": bytes_of_state,
        "share_of_limit": args.decode_tokens * least / medians[OURS],
        "seconds": seconds,
    }


def decoding_tables(family: Family, results: list[dict]) -> str:
    rows = [
        [
            str(point["N"]),
            str(point["batch"]),
            f"{point['bytes_of_state'] / 2**20:.2f}",
            *(f"{value:,.0f}" for value in point["tokens_per_second"].values()),
            show(point["transformers_to_ours_quartiles"]),
            f"{point['share_of_limit']:.1%}",
        ]
        for point in results
    ]
    header = ["N", "batch", "state, MiB", "tokens per second", "with Transformers' step", "by `model.generate`"]
    text = "### Generation\n\n"
    text += f"{family.args.num_hidden_layers} layers of width {family.shape.channels // 2}; "
    text += "forward passes with a cache, and `model.generate` with our step\n\n"
    return text + table([*header, "Transformers' time × ours", SHARE], rows)
