"""This benchmark times one resize on each engine: a model and its AdamW moments are cut to half the state.

    python scripts/benchmark_engines.py

It also times the training step before and after, on short sequences, since what a resize costs is to be compared with
what it interrupts. Of the two processes of DDP and FSDP2 each has a GPU; without two GPUs they share the CPU and speak
by gloo. Times of a loaded machine mean little, so every engine resizes `rounds` times, from 128 states down by halves,
and the median is told.
"""

import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser, MambaConfig, MambaForCausalLM, set_seed

from hf_compressm import install_scan, parameter_groups
from hf_compressm.architectures import state_sizes
from hf_compressm.surgery.shrink_and_grow import shrink_state
from hf_compressm.theory.plan import Selection

MODELS = {
    "22M": dict(hidden_size=384, num_hidden_layers=12, vocab_size=24_000),
    "130M": dict(hidden_size=768, num_hidden_layers=24, vocab_size=50_280),
}
ENGINES = {"plain": 1, "DDP": 2, "FSDP2": 2}  # with their processes


@dataclass
class Arguments:
    """These arguments say what is measured."""

    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "Sizes of the model."})
    engines: list[str] = field(default_factory=lambda: list(ENGINES), metadata={"help": "Some of plain, DDP, FSDP2."})
    rounds: int = field(default=5, metadata={"help": "Resizes of each model: 128 states, then half, and so on."})
    output: str = field(default="runs/benchmark_engines.json", metadata={"help": "JSON file to write."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    results = []
    for model in args.models:
        for engine in args.engines:
            context = torch.multiprocessing.get_context("spawn")
            answers, processes = context.SimpleQueue(), ENGINES[engine]
            torch.multiprocessing.spawn(measure, (processes, engine, model, args.rounds, answers), processes)
            results.append({"model": model, "engine": engine, "processes": processes} | answers.get())
            print(
                "{model:>5} {engine:>6}: resize {resize:.3f} s, step {before:.3f} → {after:.3f} s".format(
                    **results[-1]
                )
            )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"arguments": asdict(args), "results": results}, indent=2) + "\n")


def measure(rank: int, processes: int, engine: str, name: str, rounds: int, answers) -> None:
    """Measure, in each process, the median resize and the steps before the first and after the last, in seconds."""
    on_gpu = torch.cuda.device_count() >= processes
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(max(1, 2 // processes))
    if on_gpu:
        torch.cuda.set_device(device)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29571"}
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=processes)
    install_scan()
    set_seed(0)
    model, optimizer = prepared(MambaForCausalLM(MambaConfig(state_size=128, **MODELS[name])).to(device), engine)
    ids = torch.randint(0, 1000, (2, 32), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # moments exist from now on
    before, seconds = statistics.median(timed(step) for _ in range(3)), []
    for _ in range(rounds):
        sizes = state_sizes(getattr(model, "module", model))
        plan = {index: Selection(torch.arange(0, size, 2)) for index, size in sizes.items()}
        seconds.append(timed(lambda plan=plan: shrink_state(model, plan, optimizer)))
    step()
    after = statistics.median(timed(step) for _ in range(3))
    if rank == 0:
        answers.put({"resize": statistics.median(seconds), "all": seconds, "before": before, "after": after})
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def prepared(model: MambaForCausalLM, engine: str):
    """Return (model, optimizer), as the engine has them."""
    if engine == "DDP":
        model = DistributedDataParallel(model)
    elif engine == "FSDP2":
        mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
        for block in model.backbone.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(parameter_groups(getattr(model, "module", model), 0.1), lr=1e-4)


def timed(function) -> float:
    """Return the seconds until all processes have run it."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()

    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
