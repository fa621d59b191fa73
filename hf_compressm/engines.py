"""Every engine's oddities, and nothing else: wrappers to look through and rebuild, processes to agree, what to refuse.

One process, and DistributedDataParallel in any number of them, are served; FSDP2 is refused before training starts.
"""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import TrainingArguments

T = TypeVar("T")
SERVED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
ENGINES = "Use one process, or DistributedDataParallel: torchrun or accelerate launch with a device per process."


# Models and optimizers


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformers model behind torch.compile and DistributedDataParallel.

    Raises:
        ValueError: the model is spread over devices, sharded, or carries adapters.
    """
    model = _bare(model)
    if isinstance(model, DataParallel):
        raise ValueError(f"the model is wrapped in DataParallel. {ENGINES}")
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
                f"sharded or offloaded. {ENGINES}"
            )
    return model


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer | None:
    """The torch optimizer behind Accelerate's."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def data_parallel_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper that synchronises this model's gradients; None in a single process.

    Trainer shows its callbacks the bare model only, so the wrapper around it is looked for among all live objects.

    Raises:
        ValueError: there are several processes and nothing wraps the model, or more than one thing does.
    """
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    if isinstance(model, DistributedDataParallel):
        return model
    if process_count() == 1:
        return None
    wrappers = _live_wrappers(model)
    if len(wrappers) > 1:  # one of an earlier run, perhaps, that nobody holds any more
        del wrappers
        gc.collect()
        wrappers = _live_wrappers(model)
    if len(wrappers) != 1:
        raise ValueError(
            f"{process_count()} processes, and {len(wrappers)} DistributedDataParallel wrappers around the model; "
            f"expected one. {ENGINES}"
        )
    return wrappers[0]


def _live_wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    # By type(): isinstance() would look into proxies of objects that are gone.
    return [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel) and _bare(o) is model]


def _bare(model: nn.Module) -> nn.Module:
    while hasattr(model, "_orig_mod") or isinstance(model, DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def rebuild(wrapper: DistributedDataParallel) -> None:
    """Make the wrapper synchronise the model's present parameters, with all its options.

    Its reducer holds on to the parameters it was built for: without this, ranks would diverge without a word.
    """
    options = dict(
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        forward_sync_buffers=wrapper.forward_sync_buffers,
        process_group=wrapper.process_group,
        bucket_cap_mb=None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
        mixed_precision=wrapper.mixed_precision,
    )
    module, training, communication_hooks = wrapper.module, wrapper.training, list(wrapper._comm_hooks)
    module_hooks = {n: v for n, v in wrapper.__dict__.items() if "_hooks" in n and n != "_comm_hooks"}
    wrapper.reducer._remove_autograd_hooks()  # dynamo may keep the old reducer alive
    del wrapper.__dict__["reducer"], wrapper.__dict__["logger"]  # the logger shares the reducer's ownership
    DistributedDataParallel.__init__(wrapper, module, **options)  # checks that shapes agree between the processes
    wrapper.training = training
    wrapper.__dict__.update(module_hooks)
    for hook, state in communication_hooks:
        wrapper.register_comm_hook(hook, state)


def forget_compiled_code() -> None:
    """Let torch.compile start anew: after eight recompilations for new sizes it would fall back to eager for good."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# Processes


def process_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first_process(value: T) -> T:
    """The first process's value, in all of them; tensors in it have to be on the CPU."""
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def together() -> Iterator[None]:
    """All processes leave this block well, or all leave it with the error of those that failed. No collectives within.

    Raises:
        ValueError: in every process, when another one failed; the error itself in the process where it happened.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = [None] * process_count()
    if process_count() > 1:
        dist.all_gather_object(failures, failure and f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise ValueError(f"process {rank} of {len(failures)} failed, so none went on. {text}")


# Trainer


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse, before training starts, the engines and options of Trainer that a resize would break.

    Raises:
        ValueError: names the option, and what to do.
    """
    if args.n_gpu > 1:
        raise ValueError(f"one process on {args.n_gpu} GPUs would use DataParallel. {ENGINES}")
    if args.deepspeed_plugin or args.fsdp or args.distributed_state.distributed_type not in SERVED:
        engine = "fsdp" if args.fsdp else args.distributed_state.distributed_type.value
        raise ValueError(f"the engine '{engine}' was asked for. {ENGINES}")
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True would restart the run with a model that is cut already: set it to False."
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True would load weights of another state size under the optimizer: set it to "
            "False and load the best checkpoint after training with from_pretrained."
        )
