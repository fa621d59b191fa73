"""FSDP2 (`fully_shard`) lets each process hold a part of every parameter.

A parameter can be replaced in place only through private classes of torch, so a torch that was not tested is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..private_api import check_private_names, installed, is_tested, remedy
from .parameters import carry_over


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 holds parameters of this model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def can_run_unwrapped(model: nn.Module) -> bool:
    """Return whether an unwrapped model can be run before its wrapper was; a compiled one under FSDP2 cannot."""
    return not is_sharded(model) or isinstance(model, FSDPModule)


def check_sharding(model: nn.Module) -> None:
    """Refuse what was not tested, before anything is changed.

    Raises:
        ValueError: torch is a release that was not tested; or the model is offloaded to the CPU, lies on a mesh of
            more than one dimension (HSDP, tensor parallelism), is sharded along another axis than the first or in
            half precision, or has a distributed parameter that FSDP2 does not manage.
    """
    if not is_tested("torch"):
        raise ValueError(
            f"{installed('torch')} was not tested with FSDP2, whose parameters can be replaced only through private "
            f"classes. {remedy('torch')} Or use DistributedDataParallel."
        )
    check_private_names("torch.distributed.fsdp")
    managed = set()
    for group in _groups(model):
        for held in group.fsdp_params:
            if held.offload_to_cpu:
                raise ValueError(f"{held._param_fqn} is offloaded to the CPU: turn fsdp_config's cpu_offload off.")
            if held.sharded_param.device_mesh.ndim > 1 or held.fsdp_placement != Shard(0):
                raise ValueError(
                    f"{held._param_fqn} is placed as {held.sharded_param.placements} on a mesh of "
                    f"{held.sharded_param.device_mesh.ndim} dimensions; allowed: the first axis sharded over one."
                )
            if held.sharded_param.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"{held._param_fqn} is sharded in {held.sharded_param.dtype}: load it in float32.")
            managed.add(held.sharded_param)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter not in managed:
            raise ValueError(
                f"{name} is distributed, but no FSDP2 module in the model holds it: tensor parallelism is not served, "
                "and a model that is compiled and sharded needs auto_wrap_policy='TRANSFORMER_BASED_WRAP'."
            )


def reshard(model: nn.Module) -> None:
    """Bring all parameters back into shards, without communication."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor; where processes hold parts of it, every process has to call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered_parameters(module: nn.Module) -> Iterator[None]:
    """Make the parameters of a module whole tensors within this block, which every process has to enter."""
    sharded = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if isinstance(p, DTensor)]
    whole = [full_tensor(parameter.detach()) for _, _, parameter in sharded]
    try:
        for (owner, name, parameter), value in zip(sharded, whole, strict=True):
            owner._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter


def shard_like(value: Tensor, reference: Tensor) -> Tensor:
    """Distribute `value`, which is the same in all processes, as `reference` is, and return this process's part."""
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value.contiguous(), reference.device_mesh, reference.placements, src_data_rank=None)


def replace_sharded(model: nn.Module, old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Let FSDP2 hold `value`, the same in all processes, in the place of `old`, and return the sharded parameter."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    for group in _groups(model):
        for position, held in enumerate(group.fsdp_params):
            if held.sharded_param is old:
                held._post_load_hook_handle.remove()
                # FSDPParam keeps unsharded buffers of the old size, so it is made anew; it assigns the parameter.
                new = FSDPParam(
                    nn.Parameter(value.contiguous(), requires_grad=old.requires_grad),
                    held._module_info,
                    held.mesh_info,
                    group.post_forward_mesh_info,
                    group.device,
                    None,
                    group.mp_policy,
                    group.offload_policy,
                )
                new._param_fqn = held._param_fqn
                new.init_dtype_attrs(group.mp_policy)
                group.fsdp_params[position] = new
                return carry_over(old, new.sharded_param)
    raise ValueError("FSDP2 does not hold the parameter that is to be replaced; nothing was changed.")


def groups_restorer(model: nn.Module) -> Callable[[], None]:
    """Return a function that lets FSDP2 hold what it holds now, once the modules have these parameters again."""
    held = [(group.fsdp_params, list(group.fsdp_params)) for group in _groups(model)]

    def restore() -> None:
        for parameters, before in held:
            parameters[:] = before

    return restore


def original_class(module: nn.Module) -> type:
    """Return the class of a module, or, where FSDP2 derived one of its own, the class that it derived it from."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def change_class(module: nn.Module, new: type) -> None:
    """Change the class of a module to `new`, which has to fit its attributes; a sharded module stays sharded."""
    if isinstance(module, FSDPModule):
        new = type(f"FSDP{new.__name__}", (FSDPModule, new), {"__deepcopy__": type(module).__deepcopy__})
    module.__class__ = new


def run_sharded(model: nn.Module, function: Callable[[], Any], overrides: Mapping[str, Tensor]) -> Any:
    """Call a function that runs a model; full tensors override some parameters, each while its module runs."""
    handles = []
    for name, value in overrides.items():
        path, _, attribute = name.rpartition(".")
        handles += _substitute(_unit_of(model, path), model.get_submodule(path), attribute, value)
    try:
        return function()
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)


def _unit_of(model: nn.Module, path: str) -> nn.Module:
    """Return the module that gathers the parameters of the module at `path`: itself, or the nearest around it.

    A module that only holds parameters is never run, such as the convolution of a mixer, but that one is.
    """
    names = path.split(".")
    around = (model.get_submodule(".".join(names[:depth])) for depth in range(len(names), -1, -1))
    return next(module for module in around if isinstance(module, FSDPModule))


def _substitute(unit: nn.Module, module: nn.Module, attribute: str, value: Tensor) -> list:
    """Register hooks that put `value` in place after FSDP2 gathers the parameter, and take it out before it reshards.

    Args:
        unit: the module that gathers the parameter `attribute` of `module`.

    Returns:
        The handles of the hooks.
    """
    kept = []

    def before(*ignored):
        kept.append(module._parameters[attribute])
        module._parameters[attribute] = nn.Parameter(value.to(kept[-1].dtype), requires_grad=False)

    def after(*ignored):
        module._parameters[attribute] = kept.pop()

    return [
        unit.register_forward_pre_hook(before),
        unit.register_forward_hook(after, prepend=True, always_call=True),
    ]


def _groups(model: nn.Module) -> Iterator:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups
