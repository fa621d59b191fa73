"""A hand-written loop in two processes, and what goes wrong in one of them: `torchrun … distributed_loop.py FOLDER`.

Each rank leaves the errors it saw, and its weights after training on.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import build_model, weights_of
from datasets import load_from_disk

from hf_compressm import CompreSSMConfig, analyze, compress, install_scan

CONFIG = CompreSSMConfig(target_state_size=8, calibration_batches=4)


def batches_of(dataset, rank: int, processes: int, count: int) -> list[dict]:
    """Of `count` batches of 16 each process takes its part."""
    ids = torch.tensor(dataset[: 16 * count]["input_ids"]).view(count, processes, -1, len(dataset[0]["input_ids"]))
    return [{"input_ids": batch, "labels": batch} for batch in ids[:, rank]]


def train_and_cut(model, optimizer, batches, backward) -> None:
    """Four steps, a cut, four steps."""
    for step, batch in enumerate(batches):
        if step == 4:
            compress(model, analyze(model, batches, CONFIG), optimizer)
        backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


def faults(model, batches, rank: int) -> dict[str, str]:
    """What each process is told when one of them is in trouble."""
    bare, errors = model.module, {}

    def attempt(name: str, batches: list[dict], config: CompreSSMConfig) -> None:
        try:
            analyze(model, batches, config)
        except ValueError as error:
            errors[name] = str(error)

    attempt("data", batches[: 4 - rank], CONFIG)
    attempt("config", batches, CompreSSMConfig(target_state_size=8 - rank, calibration_batches=4))
    A_log = bare.backbone.layers[0].mixer.A_log
    kept = A_log.detach().clone()
    if rank == 1:
        A_log.data[0, 0] = float("nan")
    attempt("weights", batches, CONFIG)
    A_log.data.copy_(kept)
    embedding = bare.get_input_embeddings().weight
    kept = embedding.detach().clone()
    if rank == 1:
        embedding.data.fill_(float("nan"))
    attempt("activations", batches, CONFIG)
    embedding.data.copy_(kept)
    return errors


def main() -> None:
    install_scan()
    folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
    rank = accelerator.process_index
    batches = batches_of(load_from_disk(folder / "dataset"), rank, accelerator.num_processes, 8)
    model = build_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6))
    errors, calls = faults(model, batches, rank), []
    model.register_forward_hook(lambda *inputs: calls.append(inputs), with_kwargs=True)
    train_and_cut(model, optimizer, batches, accelerator.backward)
    torch.save(weights_of(accelerator.unwrap_model(model)), folder / f"loop {rank}.pt")
    (folder / f"loop {rank}.json").write_text(json.dumps(errors | {"calls of the wrapper's hook": len(calls)}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
