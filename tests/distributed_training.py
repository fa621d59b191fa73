"""Runs of `test_distributed.py` in processes of their own: `torchrun … distributed_training.py FOLDER VARIANT…`.

Or `FOLDER resume CHECKPOINT`, to go on from there. Each variant trains with cuts and leaves, for every rank, the
weights after each step.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import build_model, weights_of
from datasets import load_from_disk
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan

GLOBAL_BATCH = 16
VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "find unused": {"ddp_find_unused_parameters": True},
    "static graph": {"ddp_static_graph": True},
    "small buckets": {"ddp_bucket_cap_mb": 1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "twice": {"trainings": 2},
    "saving": {"save_strategy": "steps", "save_steps": 4},
}


class WeightsAfterEachStep(TrainerCallback):
    """Comes after the callback that cuts."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights_of(model))


def train(
    folder: Path, dataset, resume_from: Path | None = None, trainings: int = 1, **options
) -> tuple[Trainer, list[dict]]:
    """Twelve steps, cuts after the third and the sixth; and again, if asked."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        learning_rate=3e-3,
        adam_epsilon=1e-6,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world_size > 1 else None,
        **({"save_strategy": "no"} | options),
    )
    callback = CompreSSMCallback(
        CompreSSMConfig(target_state_size=4, calibration_batches=4), CompreSSMSchedule(end=0.5, events=2)
    )
    after_each_step = WeightsAfterEachStep()
    trainer = Trainer(
        build_model(),
        arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
        callbacks=[callback, after_each_step],
    )
    for _ in range(trainings):
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    return trainer, after_each_step.weights


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    runs = {"resume": {"resume_from": Path(names[1])}} if names[0] == "resume" else {n: VARIANTS[n] for n in names}
    install_scan()
    dataset = load_from_disk(folder / "dataset")
    for name, options in runs.items():
        trainer, weights = train(folder / name, dataset, **options)
        assert dist.get_world_size() == 2
        wrapped = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
        assert type(wrapped) is DistributedDataParallel
        assert (wrapped is not trainer.model_wrapped) == ("torch_compile" in options)
        torch.save(weights, folder / f"{name} {dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
