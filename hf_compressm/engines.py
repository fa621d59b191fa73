"""Every engine's oddities, and nothing else: wrappers to look through, set-ups to refuse.

One process without a wrapper is served so far; DDP and FSDP2 are refused before training starts.
"""

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend
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
    if getattr(model, "peft_config", None):
        raise ValueError("the model carries PEFT adapters, and only they would be saved: merge them into it first.")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or "mps" in {device.type for device in devices}:
        raise ValueError(
            f"the model is on {sorted(map(str, devices))}: use one CPU or CUDA device (float64 is needed)."
        )
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
    if args.deepspeed_plugin or args.fsdp or args.distributed_state.distributed_type is not DistributedType.NO:
        engine = "fsdp" if args.fsdp else args.distributed_state.distributed_type.value
        raise ValueError(f"the engine '{engine}' was asked for. {ONE_PROCESS}")
    if args.torch_compile or AcceleratorState().dynamo_plugin.backend is not DynamoBackend.NO:
        raise ValueError("torch_compile is not supported while the state shrinks: set it to False.")
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True would restart the run with a model that is cut already: set it to False."
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True would load weights of another state size under the optimizer: set it to "
            "False and load the best checkpoint after training with from_pretrained."
        )
