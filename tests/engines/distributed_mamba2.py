"""Runs of `test_mamba2_distributed.py`: `torchrun … distributed_mamba2.py FOLDER ENGINE VARIANT…`.

Each variant of the engine trains a Mamba-2 and leaves, for every rank, the weights after each step. `VARIANT@STEP`
goes on from the checkpoint after that step of an earlier launch.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_from_disk
from distributed_training import NEVER_CUT, SHARDED, WRAPPED, check_engine, train
from scalar_decay_models import build_mamba2

from hf_compressm import install_scan
from hf_compressm.architectures import state_layers

# Sums in another order differ in the last bit, which Adam makes much larger where a gradient is small.
DEFAULTS = {"build": build_mamba2, "learning_rate": 1e-3, "adam_epsilon": 3e-5}
FOUR = {"target_state_size": 4}
NEVER = {"tolerance": 1e-12, "min_reduction": 0.5}
SAVING = {"save_strategy": "steps", "save_steps": 2}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "best_at": 2, "attached": True, **SAVING}
BASES = {basis: {"basis": basis} for basis in ("axis", "balanced")}
COMMON = {
    **{basis: {"goal": FOUR | one, **SAVING} for basis, one in BASES.items()},
    **{f"never {basis}": {"goal": NEVER | one} for basis, one in BASES.items()},
    "no callback": {"goal": {}},
    "one layer": {"goal": FOUR | BASES["balanced"] | {"skip_layers": [1]}},
    **{f"rollback {basis}": {"goal": FOUR | one, "rollback": "memory"} for basis, one in BASES.items()},
    "rollback disk": {"goal": FOUR | BASES["balanced"], "rollback": "disk"},
    "no rollback": {"rollback": NEVER_CUT},
    **{f"best {basis}": {"goal": FOUR | one, **BEST} for basis, one in BASES.items()},
    "accumulation": {"goal": FOUR | BASES["balanced"], "gradient_accumulation_steps": 2},
    "checkpointing": {"goal": FOUR | BASES["balanced"], "activation_checkpointing": True},
}
ONE_GROUP = {"goal": FOUR | BASES["balanced"], "build": partial(build_mamba2, n_groups=1), **SAVING}
MIXERS = {**WRAPPED, "transformer_layer_cls_to_wrap": ["CompreSSMMamba2Mixer"]}
PARTS = {**WRAPPED, "transformer_layer_cls_to_wrap": ["Linear", "Mamba2Block"]}
# Without `ddp_find_unused_parameters`, which is the default of Trainer, it would wait for what is not used.
DDP = {name: {"ddp_find_unused_parameters": False} | options for name, options in COMMON.items()}
DDP |= {"find unused": {"goal": FOUR | BASES["balanced"], "ddp_find_unused_parameters": True}}
DDP |= {"static graph": {"goal": FOUR | BASES["balanced"], "ddp_static_graph": True}}
FSDP = {name: {"fsdp_config": WRAPPED} | options for name, options in COMMON.items()} | {
    "sharded": {"fsdp_config": SHARDED, "goal": FOUR | BASES["balanced"], **SAVING},
    "one group": {"fsdp_config": WRAPPED, **ONE_GROUP},  # of which one process has the projections, the other nothing
    "whole model": {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}, "goal": FOUR | BASES["balanced"]},
    "mixers": {"fsdp_config": MIXERS, "goal": FOUR | BASES["balanced"]},
    "parts": {"fsdp_config": PARTS, "goal": FOUR | BASES["axis"]},
}
ENGINES = {"ddp": DDP, "fsdp": FSDP}


def check_run(engine: str, trainer, goal: dict) -> None:
    check_engine(engine, trainer, is_compiled=False)
    assert type(trainer.model).__name__.endswith(
        "CompreSSMMamba2ForCausalLM" if goal.get("basis") == "balanced" else "Mamba2ForCausalLM"
    )
    if engine == "ddp":
        sent = {name for name, _ in trainer.model.named_parameters()} - trainer.model_wrapped.parameters_to_ignore
        unused = {
            f"{name}.{path}"
            for name, module in trainer.model.named_modules()
            if goal.get("basis") == "balanced" and module in state_layers(trainer.model).values()
            for path in ("B_proj", "C_proj")
            if module.reduced_state_size is None
        }
        assert sent == {name for name, _ in trainer.model.named_parameters()} - unused


def main() -> None:
    folder, engine, *names = Path(sys.argv[1]), *sys.argv[2:]
    install_scan()
    dataset = load_from_disk(folder / "dataset")
    for name in names:
        variant, _, step = name.partition("@")
        options = DEFAULTS | {"goal": {}} | ENGINES[engine][variant]
        own = folder / engine / (f"{variant} from {step}" if step else variant)
        resume_from = folder / engine / variant / f"checkpoint-{step}" if step else None
        trainer, weights = train(own, dataset, resume_from, **options)
        check_run(engine, trainer, options["goal"])
        torch.save(weights, folder / f"{engine} {name} {dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
