"""Every engine's oddities, and nothing else: wrappers to look through, set-ups to refuse.

One process without a wrapper is served so far; DDP and FSDP2 are refused before training starts.
"""

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import TrainingArguments

ONE_PROCESS = "This version resizes models in one process only: start a single process and show it one device."


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformers model behind torch.compile.

    Raises:
        ValueError: the model is spread over devices or processes.
    """
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(f"the model is wrapped in {type(model).__name__}. {ONE_PROCESS}")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__} on device '{parameter.device.type}': the model is "
                f"sharded or offloaded. {ONE_PROCESS}"
            )
    return model


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer | None:
    """The torch optimizer behind Accelerate's."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse, before training starts, the engines and options of Trainer that a resize would break.

    Raises:
        ValueError: names the option, and what to do.
    """
    if args.world_size > 1 or args.n_gpu > 1 or (dist.is_initialized() and dist.get_world_size() > 1):
        raise ValueError(f"{args.world_size} processes on {args.n_gpu} GPUs each. {ONE_PROCESS}")
    if args.deepspeed or args.fsdp:
        raise ValueError(f"{'deepspeed' if args.deepspeed else 'fsdp'} is set. {ONE_PROCESS}")
    if args.torch_compile:
        raise ValueError("torch_compile=True is not supported while the state shrinks: set it to False.")
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True would load weights of another state size under the optimizer: set it to "
            "False and load the best checkpoint after training with from_pretrained."
        )
