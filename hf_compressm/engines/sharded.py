"""FSDP2 (`fully_shard`): parameters that each process holds a part of.

A parameter can be replaced in place only through private classes of torch: versions that were not tested are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

TESTED = ("2.13",)  # releases of torch


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds parameters of this model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_sharding(model: nn.Module) -> None:
    """Refuse what was not tested, before anything is changed.

    Raises:
        ValueError: another release of torch, offloading to the CPU, a mesh of more than one dimension (HSDP, tensor
            parallelism), shards of another axis than the first, half-precision weights, or a distributed parameter
            that FSDP2 does not manage.
    """
    if not torch.__version__.startswith(TESTED):
        raise ValueError(
            f"torch {torch.__version__}: a parameter that FSDP2 holds can be replaced in torch {', '.join(TESTED)} "
            "only, through private classes. Use one of these, or DistributedDataParallel."
        )
    managed = set()
    for group in _groups(model):
        if not all(hasattr(group, name) for name in ("fsdp_params", "post_forward_mesh_info", "mp_policy")):
            raise ValueError(f"FSDP2 in torch {torch.__version__} is not as expected: use DistributedDataParallel.")
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
    """Bring all parameters back into shards; without communication."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a part; then every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The parameters of a module as whole tensors within this block; every process has to enter it."""
    sharded = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if isinstance(p, DTensor)]
    whole = [full(parameter.detach()) for _, _, parameter in sharded]
    try:
        for (owner, name, parameter), value in zip(sharded, whole, strict=True):
            owner._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter


def shard_like(value: Tensor, reference: Tensor) -> Tensor:
    """This process's part of `value`, the same in all of them, distributed as `reference` is."""
    if not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value.contiguous(), reference.device_mesh, reference.placements, src_data_rank=None)


def replace_sharded(model: nn.Module, old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Let FSDP2 hold `value`, the same in all processes, in the place of `old`; the new sharded parameter."""
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
                return new.sharded_param
    raise ValueError("FSDP2 does not hold the parameter that is to be replaced; nothing was changed.")


def original_class(module: nn.Module) -> type:
    """The class of a module, before FSDP2 derived one of its own from it."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def change_class(module: nn.Module, new: type) -> None:
    """Make a module one of the class `new`, which has to take it as it is; a sharded one stays sharded."""
    if isinstance(module, FSDPModule):
        new = type(f"FSDP{new.__name__}", (FSDPModule, new), {"__deepcopy__": type(module).__deepcopy__})
    module.__class__ = new


def forward_sharded(model: nn.Module, inputs: dict, overrides: dict[str, Tensor]):
    """One forward pass with some parameters overridden by full tensors, each while its module runs."""
    handles = []
    for name, value in overrides.items():
        path, _, attribute = name.rpartition(".")
        handles += _substitute(model.get_submodule(path), attribute, value)
    try:
        return model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)


def _substitute(module: nn.Module, attribute: str, value: Tensor) -> list:
    """Hooks that run within those of FSDP2: after it has gathered the parameter, before it lets go of it."""
    kept = []

    def before(*ignored):
        kept.append(module._parameters[attribute])
        module._parameters[attribute] = nn.Parameter(value.to(kept[-1].dtype), requires_grad=False)

    def after(*ignored):
        module._parameters[attribute] = kept.pop()

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, prepend=True, always_call=True),
    ]


def _groups(model: nn.Module) -> Iterator:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups
