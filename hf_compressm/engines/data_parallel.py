"""DistributedDataParallel wraps a model; this module finds the wrapper and rebuilds it around new parameters."""

import gc
import weakref
from collections.abc import Callable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..private_api import check_private_names
from .processes import process_count
from .wrappers import ENGINES, strip_wrappers

NEWER_OPTIONS = ("skip_all_reduce_unused_params", "batched_grad_copy")  # only some releases of torch have these
POWER_SGD_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")


def data_parallel_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that synchronises this model's gradients, or None in a single process.

    Trainer shows its callbacks the model without its wrapper, so the wrapper is looked for among all live objects.

    Raises:
        ValueError: there are several processes and nothing wraps the model, or more than one thing does; or the
            wrapper cannot be rebuilt with the installed torch or with its options.
    """
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    if isinstance(model, DistributedDataParallel):
        return _checked_wrapper(model)
    if process_count() == 1:
        return None
    wrappers = _live_wrappers(model)
    if len(wrappers) > 1:  # one of an earlier run, perhaps, that nobody holds any more
        del wrappers
        gc.collect()
        wrappers = _live_wrappers(model)
    if len(wrappers) != 1:
        raise ValueError(
            f"{process_count()} processes train, and {len(wrappers)} DistributedDataParallel wrappers hold the model; "
            f"expected one. {ENGINES}"
        )
    return _checked_wrapper(wrappers[0])


def rebuild(wrapper: DistributedDataParallel) -> None:
    """Make the wrapper synchronise the model's present parameters, with all its options.

    Its reducer holds on to the parameters that it was built for; left so, the processes would silently diverge.
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
        **{name: getattr(wrapper, name) for name in NEWER_OPTIONS if hasattr(wrapper, name)},
    )
    module, training, communication_hooks = wrapper.module, wrapper.training, list(wrapper._comm_hooks)
    module_hooks = {n: v for n, v in wrapper.__dict__.items() if "_hooks" in n and n != "_comm_hooks"}
    reducer = wrapper.__dict__.pop("reducer", None)
    wrapper.__dict__.pop("logger", None)  # it shares the reducer's ownership
    if reducer is not None:
        reducer._remove_autograd_hooks()  # dynamo may keep the old reducer alive
        del reducer
    DistributedDataParallel.__init__(wrapper, module, **options)  # checks that shapes agree between the processes
    wrapper.training = training
    wrapper.__dict__.update(module_hooks)
    for hook, state in communication_hooks:
        for memory in POWER_SGD_MEMORIES:  # by bucket, of the old sizes
            getattr(state, memory, {}).clear()
        wrapper.register_comm_hook(state, hook)


def wrapper_restorer(wrapper: DistributedDataParallel) -> Callable[[], None]:
    """Return a function that builds the wrapper anew, as it is now, if `rebuild` was begun; the module comes first.

    The old reducer holds memory for all gradients, so it is not kept until it is known that nothing failed.
    """
    old = weakref.ref(wrapper.reducer)
    attributes = {name: value for name, value in vars(wrapper).items() if name not in ("reducer", "logger")}

    def restore() -> None:
        if old() is None or vars(wrapper).get("reducer") is not old():
            if old() is not None:
                old()._remove_autograd_hooks()
            vars(wrapper).update(attributes)
            rebuild(wrapper)

    return restore


def _checked_wrapper(wrapper: DistributedDataParallel) -> DistributedDataParallel:
    """Return the wrapper, or refuse one that cannot be rebuilt.

    Raises:
        ValueError: the installed torch or an option of the wrapper does not allow it.
    """
    check_private_names("torch.nn.parallel.DistributedDataParallel", "torch.distributed.Reducer")
    if getattr(wrapper, "_delay_all_reduce_params", None):
        raise ValueError("delay_all_reduce_named_params of DistributedDataParallel cannot follow a resize: drop it.")
    return wrapper


def _live_wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    # By type(): isinstance() would look into proxies of objects that are gone.
    return [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel) and strip_wrappers(o) is model]
