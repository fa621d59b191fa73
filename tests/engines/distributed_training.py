"""Runs of `test_distributed.py` in their own processes: `torchrun … distributed_training.py FOLDER ENGINE VARIANT…`.

Each variant of the engine (`ddp`, `fsdp`) trains with cuts and leaves, for every rank, the weights after each step.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import build_model, weights_of
from datasets import load_from_disk
from fsdp_on_cpu import enable_fsdp_on_cpu
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainer_callbacks import SnapshotAndRestore, WorseAt
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan
from hf_compressm.architectures.selective.per_layer import CompreSSMMambaForCausalLM

GLOBAL_BATCH = 16
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
SAVING = {"save_strategy": "steps", "save_steps": 4}
BF16 = {
    "bf16": True,
    "learning_rate": 5e-4,
}  # from the first step on gradients differ in bf16's last bit, by batch size
WRAPPED = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "best_at": 4}
NEVER_CUT = "of a run never cut"
ROLLBACKS = {f"rollback {how}": {"rollback": how} for how in ("memory", "disk", NEVER_CUT)}
PER_LAYER = {"goal": {"cut_fraction": 0.5, "allocation": "per_layer", "skip_layers": [1]}, **SAVING}
SHARDED = {**WRAPPED, "state_dict_type": "SHARDED_STATE_DICT"}
DDP = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "find unused": {"ddp_find_unused_parameters": True},
    "static graph": {"ddp_static_graph": True},
    "small buckets": {"ddp_bucket_cap_mb": 1},
    "compiled": COMPILED,
    "fp16 hook": {"communication_hook": default_hooks.fp16_compress_hook},
    "bf16": BF16,
    "attached": {"attached": True},
    "twice": {"trainings": 2},
    "saving": SAVING,
    "per layer": PER_LAYER,
    "best": {**BEST, "trainings": 2, "attached": True},
    **ROLLBACKS,
}
FSDP = {
    "full": {"fsdp_config": WRAPPED, **SAVING},
    "sharded": {"fsdp_config": SHARDED, **SAVING},
    "per layer": {"fsdp_config": WRAPPED, **PER_LAYER},
    "accumulation": {"fsdp_config": WRAPPED, "gradient_accumulation_steps": 2},
    "checkpointing": {"fsdp_config": {**WRAPPED, "activation_checkpointing": True}},
    "whole model": {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}},
    "mixers": {"fsdp_config": {**WRAPPED, "transformer_layer_cls_to_wrap": ["MambaMixer"]}},
    "no reshard": {"fsdp_config": {**WRAPPED, "reshard_after_forward": False}},
    "compiled": {"fsdp_config": WRAPPED, **COMPILED},
    "bf16": {"fsdp_config": WRAPPED, **BF16},
    "twice": {"fsdp_config": WRAPPED, "trainings": 2},
    "best": {"fsdp_config": WRAPPED, **BEST, "trainings": 2, "attached": True},
    "best sharded": {"fsdp_config": SHARDED, **BEST, "attached": True},
    **{name: {"fsdp_config": WRAPPED, **options} for name, options in ROLLBACKS.items()},
}
ENGINES = {"ddp": DDP, "fsdp": FSDP}
SLOW = {  # what others prove as well: "best" trains twice and is attached, too
    "ddp": ("find unused", "small buckets", "attached", "twice"),
    "fsdp": ("mixers", "no reshard", "twice", "best sharded"),
}


class WeightsAfterEachStep(TrainerCallback):
    """Comes after the callback that cuts."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(full_weights_of(model))


class CommunicationHook(TrainerCallback):
    """Compresses gradients on their way."""

    def __init__(self, hook, trainer: Trainer):
        self.hook, self.trainer = hook, trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.model_wrapped.register_comm_hook(None, self.hook)


def full_weights_of(model) -> dict[str, torch.Tensor]:
    weights = weights_of(getattr(model, "_orig_mod", model))
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def train(
    folder: Path,
    dataset,
    resume_from: Path | None = None,
    trainings: int = 1,
    attached: bool = False,
    best_at: int | None = None,
    rollback: str | None = None,
    communication_hook=None,
    goal: dict | None = None,
    build=build_model,
    **options,
) -> tuple[Trainer, list[dict]]:
    """Twelve steps, cuts after the third and the sixth; and again, if asked.

    Args:
        best_at: the step whose evaluation comes out best, for `load_best_model_at_end`.
        rollback: the cut after the third step is undone after the fourth, from "memory" or "disk"; or "of a run never
            cut": the same is done to a run without cuts.
        communication_hook: registered on the wrapper.
        goal: what to keep; by default four states. An empty one leaves the callback out.
        build: what builds the model.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if rollback:
        options |= {"eval_strategy": "steps", "eval_steps": 2}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world_size > 1 else None,
        fsdp="fsdp_config" in options,
        load_best_model_at_end=best_at is not None,
        **({"save_strategy": "no", "learning_rate": 3e-3, "adam_epsilon": 1e-6} | options),
    )
    if "fsdp_config" in options:
        enable_fsdp_on_cpu()
    watching = {"rollback_tolerance": 0.05, "rollback_storage": rollback} if rollback in ("memory", "disk") else {}
    callback = CompreSSMCallback(
        CompreSSMConfig(**{"calibration_batches": 4} | (goal or {"target_state_size": 4})),
        CompreSSMSchedule(end=0.5, events=2, **watching),
    )
    is_cut = rollback != NEVER_CUT and goal != {}
    attached, after_each_step = attached or "fsdp_config" in options, WeightsAfterEachStep()
    worse_at = {4} if watching else set(range(2, 13, 2)) - {best_at} if best_at else set()
    trainer = Trainer(
        build(),
        arguments,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(16)),
        data_collator=default_data_collator,
        callbacks=[WorseAt(*worse_at)] + [callback] * (not attached and is_cut),
    )
    if rollback == NEVER_CUT:
        trainer.add_callback(SnapshotAndRestore(3, 4))
    elif attached and is_cut:
        callback.attach(trainer)
    trainer.add_callback(after_each_step)
    if communication_hook and world_size > 1:
        trainer.add_callback(CommunicationHook(communication_hook, trainer))
    for _ in range(trainings):
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    return trainer, [*after_each_step.weights, full_weights_of(trainer.model)]


def check_engine(engine: str, trainer: Trainer, is_compiled: bool) -> None:
    """The run was what it was meant to be."""
    assert dist.get_world_size() == 2
    wrapped = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    assert (wrapped is not trainer.model_wrapped) == is_compiled
    if engine == "ddp":
        assert type(wrapped) is DistributedDataParallel
    else:
        assert isinstance(trainer.model_wrapped, FSDPModule) and trainer.is_fsdp_enabled
        assert all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())


def main() -> None:
    folder, engine, *names = Path(sys.argv[1]), *sys.argv[2:]
    install_scan()
    dataset = load_from_disk(folder / "dataset")
    for name in names:
        variant, _, checkpoint = name.partition("@")  # "saving@FOLDER" resumes from there
        options = ENGINES[engine][variant]
        resume_from = Path(checkpoint) if checkpoint else None
        trainer, weights = train(folder / engine / variant, dataset, resume_from, **options)
        check_engine(engine, trainer, "torch_compile" in options)
        is_per_layer = isinstance(trainer.model, CompreSSMMambaForCausalLM)
        assert trainer.model.config.is_heterogeneous == is_per_layer == ("goal" in options)
        torch.save(weights, folder / f"{engine} {variant}{' resumed' if checkpoint else ''} {dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
