"""Accelerate turns FSDP on for GPUs only. For the tests: let it take these gloo processes for such."""

import os

from accelerate.state import DistributedType, PartialState


def enable_fsdp_on_cpu() -> None:
    """To be called when TrainingArguments exist, and Trainer does not yet."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
