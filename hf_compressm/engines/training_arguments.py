"""Trainer's arguments are checked for what a resize would break."""

import os

from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from .sharded import is_sharded
from .wrappers import ENGINES, strip_wrappers

SERVED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
ATTACH = "Call callback.attach(trainer) after building the Trainer"


def check_training_arguments(args: TrainingArguments, model: nn.Module, attached: bool) -> None:
    """Refuse, before training starts, the engines and options of Trainer that a resize would break.

    Args:
        model: the model as Trainer has prepared it.
        attached: whether the callback can reach the Trainer itself.

    Raises:
        ValueError: an option would break; the error names it and says what to do.
    """
    check_engine(args, attached)
    if fsdp_is_asked(args) and not is_sharded(strip_wrappers(model)):
        raise ValueError(
            "FSDP was asked for, but the model is not sharded: Accelerate quietly ignores FSDP on a CPU, and in a "
            "single process. Drop the FSDP options there."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True would restart the run with a model that is cut already: set it to False."
        )


def check_engine(args: TrainingArguments, attached: bool) -> None:
    """Refuse what can be refused as soon as the arguments are known.

    Raises:
        ValueError: an option would break; the error names it and says what to do.
    """
    if args.n_gpu > 1:
        raise ValueError(f"one process on {args.n_gpu} GPUs would use DataParallel. {ENGINES}")
    if args.deepspeed_plugin or args.distributed_state.distributed_type not in SERVED:
        raise ValueError(f"the engine '{args.distributed_state.distributed_type.value}' was asked for. {ENGINES}")
    if fsdp_is_asked(args) and int((args.fsdp_config or {}).get("version", os.environ.get("FSDP_VERSION", 2))) != 2:
        raise ValueError("FSDP1 was asked for. Set fsdp_config's version to 2 (fsdp_version: 2 in Accelerate's).")
    for reason, wanted in (
        ("FSDP loads a checkpoint into a model that is sharded already", fsdp_is_asked(args)),
        ("load_best_model_at_end=True may load weights of another state size", args.load_best_model_at_end),
    ):
        if wanted and not attached:
            raise ValueError(f"{reason}, which a callback alone cannot follow. {ATTACH}.")


def fsdp_is_asked(args: TrainingArguments) -> bool:
    """Return whether Trainer's options or Accelerate's configuration ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
