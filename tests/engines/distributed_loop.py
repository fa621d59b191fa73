"""A hand-written loop in two processes, and what goes wrong in one: `torchrun … distributed_loop.py FOLDER ENGINE`.

Each rank leaves the errors it saw, and its weights after training on.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import build_model
from datasets import load_from_disk
from distributed_training import full_weights_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import set_seed

from hf_compressm import CompreSSMConfig, LRUConfig, LRUForSequenceClassification, analyze, compress, install_scan

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


@contextmanager
def mattering_states(model):
    """States that were just initialised do little: within the block they do 256 times that."""
    weights = [layer.mixer.x_proj.weight for layer in getattr(model, "module", model).backbone.layers]
    with torch.no_grad():
        for weight in weights:
            weight *= 16
        yield
        for weight in weights:
            weight /= 16


def measured(model, batches) -> list[float]:
    """What a report says of a cut that matters: loss before and after, the change by each layer alone, and recall.

    And the sizes of a global allocation, which rest on losses measured before.
    """
    with mattering_states(model):
        config = replace(CONFIG, target_state_size=2, selection="smallest", compensate=False)
        report = analyze(model, batches, replace(config, recall_pairs=4))
        pooled = analyze(model, batches, replace(CONFIG, allocation="global"))
    losses = [report.loss_before, report.loss_after, *report.single_layer_loss_change.values()]
    return [*losses, report.recall_before.loss, report.recall_after.loss, *pooled.state_sizes.values()]


def refitted(model, batches) -> list[float]:
    """The rise of the loss by a cut, and by a cut with a refit, on the same batches."""
    config = replace(CONFIG, target_state_size=2, refit=True, calibration_batches=6)
    with mattering_states(model):
        fitted = analyze(model, batches, config)
        one_to_judge = [batches[i] for i in (0, 2, 3, 5)]  # as above: statistics and losses
        plain = analyze(model, one_to_judge, replace(config, refit=False, calibration_batches=4))
    assert fitted.is_refitted
    return [report.loss_after - report.loss_before for report in (plain, fitted)]


def scored_by_gradients(model, batches) -> list[float] | str:
    """Scores of all layers by the criterion that needs gradients, or why there are none."""
    try:
        report = analyze(model, batches, replace(CONFIG, criterion="taylor"))
    except ValueError as error:
        return str(error)
    assert all(parameter.grad is None for parameter in model.parameters())
    return torch.cat(list(report.scores.values())).tolist()


def measured_on_fewer(model, batches, rank: int) -> list[list[float]]:
    """Losses where one process has fewer batches than the other, and where both have those few."""
    reports = [analyze(model, batches[:count], CONFIG) for count in (4 - rank, 3)]
    return [[report.loss_before, report.loss_after, report.tokens] for report in reports]


def faults(model, batches, rank: int) -> dict[str, str]:
    """What each process is told when one of them is in trouble."""
    bare, errors = getattr(model, "module", model), {}

    def attempt(name: str, action) -> None:
        try:
            action()
        except ValueError as error:
            errors[name] = str(error)

    def damage(name: str, parameter: torch.nn.Parameter) -> None:
        part = parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()
        kept = part.clone()
        if rank == 1:
            part.fill_(float("nan"))
        attempt(name, lambda: analyze(model, batches, CONFIG))
        part.copy_(kept)

    attempt("data", lambda: analyze(model, batches[: 2 - rank], CONFIG))
    other = CompreSSMConfig(target_state_size=8 - rank, calibration_batches=4)
    attempt("config", lambda: analyze(model, batches, other))
    report = analyze(model, batches, CONFIG)
    if rank == 1:
        report.plan[0] = replace(report.plan[0], kept_states=torch.arange(8) + 1 + report.plan[0].kept_states[0])
    attempt("plan", lambda: compress(model, report))
    damage("weights", bare.backbone.layers[0].mixer.A_log)
    damage("activations", bare.get_input_embeddings().weight)
    return errors


def truncate_in_training(model, optimizer, rank: int, processes: int, backward) -> None:
    """A time-invariant model: three steps, a balanced truncation, three steps."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, processes, 8 // processes, 20, generator=generator)[:, rank]
    for step, batch in enumerate(values):
        if step == 3:
            compress(model, analyze(model, None, CompreSSMConfig(target_state_size=8)), optimizer)
        backward(model(input_values=batch, labels=(batch.sum(-1) > 0).long()).loss)
        optimizer.step()
        optimizer.zero_grad()


def build_lru() -> LRUForSequenceClassification:
    set_seed(0)
    sizes = dict(state_size=16, hidden_size=8, num_hidden_layers=2, num_labels=2)
    return LRUForSequenceClassification(LRUConfig(**sizes, hidden_dropout_prob=0.0))


def prepared(engine: str, model: torch.nn.Module):
    """(model, optimizer, backward) of two processes."""
    if engine == "ddp":
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
        return *accelerator.prepare(model, optimizer), accelerator.backward
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for block in model.backbone.layers if hasattr(model, "backbone") else ():
        fully_shard(block.mixer.x_proj, mesh=mesh)  # the smallest unit: its projection by itself
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6), torch.Tensor.backward


def main() -> None:
    install_scan()
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    model, optimizer, backward = prepared(engine, build_model())
    rank, calls = dist.get_rank(), []
    batches = batches_of(load_from_disk(folder / "dataset"), rank, dist.get_world_size(), 8)
    left = faults(model, batches, rank) | {
        "measured": measured(model, batches),
        "refitted": refitted(model, batches),
        "fewer": measured_on_fewer(model, batches, rank),
        "gradients": scored_by_gradients(model, batches),
    }
    model.register_forward_hook(lambda *inputs: calls.append(inputs), with_kwargs=True)
    train_and_cut(model, optimizer, batches, backward)
    torch.save(full_weights_of(getattr(model, "module", model)), folder / f"{engine} loop {rank}.pt")
    (folder / f"{engine} loop {rank}.json").write_text(json.dumps(left | {"calls of the hook": len(calls)}))
    model, optimizer, backward = prepared(engine, build_lru())
    truncate_in_training(model, optimizer, rank, dist.get_world_size(), backward)
    torch.save(full_weights_of(getattr(model, "module", model)), folder / f"{engine} lru {rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
