"""Engines put wrappers around a model and an optimizer; these functions look behind them."""

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .sharded import check_sharding, is_sharded, reshard

ENGINES = (
    "Use one process, or DistributedDataParallel or FSDP2 in several: torchrun or accelerate launch with a device per "
    "process."
)


def strip_wrappers(model: nn.Module) -> nn.Module:
    """Return the model behind torch.compile, DistributedDataParallel and a running average, without any check."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel | AveragedModel):
            model = model.module
        else:
            return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Transformers model behind torch.compile, DistributedDataParallel and a running average.

    An FSDP2 model has no wrapper; its parameters are brought back into shards where an evaluation left them gathered.

    Raises:
        ValueError: the model is spread over devices, offloaded or quantised, carries adapters, or is sharded in a way
            that is not known.
    """
    model = strip_wrappers(model)
    if isinstance(model, DataParallel | FullyShardedDataParallel):
        raise ValueError(f"the model is wrapped in {type(model).__name__}. {ENGINES}")
    if getattr(model, "peft_config", None):
        raise ValueError("the model carries PEFT adapters, and only they would be saved: merge them into it first.")
    devices = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in devices:
        raise ValueError(
            "weights of the model are on device 'meta': it is offloaded (device_map, cpu_offload) or was built "
            "without weights. Load it onto one CPU or CUDA device."
        )
    if len(devices) > 1 or "mps" in {device.type for device in devices}:
        raise ValueError(
            f"the model is on {sorted(map(str, devices))}: use one CPU or CUDA device (float64 is needed); where it "
            "does not fit, FSDP2 in several processes."
        )
    if is_sharded(model):
        reshard(model)
        check_sharding(model)
        return model
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor):
            raise ValueError(f"{name} is a DTensor: the model is split (tensor parallelism?). {ENGINES}")
        if type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__}, expected a plain tensor: cut first, then quantise."
            )
    return model


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer | None:
    """Return the optimizer of torch behind Accelerate's."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
