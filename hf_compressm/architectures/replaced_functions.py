"""This module replaces functions that models of Transformers call, keeps the originals, and tells whose kernel serves.

A function that is replaced is a global of the module that defines a model, or a method of a class there. Its stand-in
is made by a `StandIn`, which is given that owner and the function's name. Kernels of the Hub and of other packages
keep their place, and tensors that such a kernel does not take, those on a CPU, never reach it.
"""

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

import torch

from ..kernels.dispatch import FOREIGN, NAMES, scan_name
from .foreign_kernels import kernel_of, reference_of

Owner = ModuleType | type
StandIn = Callable[[Owner, str], Callable]

PACKED = ("seq_idx", "cu_seqlens")  # what tells sequences apart that lie behind each other in a row

_originals: dict[tuple[Owner, str], Callable] = {}  # what was replaced


def replace_functions(owners: Iterable[Owner], stand_ins: Mapping[str, StandIn]) -> None:
    """Put stand-ins in the place of the functions of these names, in each of the owners that has them."""
    for owner in owners:
        for name, stand_in in stand_ins.items():
            if hasattr(owner, name):  # a Zamba has no fused block
                replacement = stand_in(owner, name)
                _originals[owner, name] = getattr(owner, name)
                setattr(owner, name, replacement)


def put_functions_back() -> None:
    """Put back all that was replaced."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)


def any_is_replaced() -> bool:
    """Return whether any function is replaced now."""
    return bool(_originals)


def original_function(module: ModuleType, name: str) -> Callable:
    """Return the function of Transformers, whether it is replaced or not."""
    return _originals.get((module, name)) or getattr(module, name)


@torch.compiler.assume_constant_result
def foreign_kernel(module: ModuleType, name: str, device_type: str) -> str | None:
    """Return whose kernel this function has on this kind of device, "hub" or "mamba_ssm", or None."""
    return kernel_of(original_function(module, name), device_type)


@torch.compiler.assume_constant_result
def serving_scan(module: ModuleType, name: str, device_type: str, own: tuple[str, ...] = NAMES) -> str:
    """Return the name of the scan that serves where this function is called on this kind of device.

    Args:
        own: the implementations of such a scan in this package.
    """
    return scan_name(device_type, other=foreign_kernel(module, name, device_type), own=own)


def is_packed(options: Mapping) -> bool:
    """Return whether options of a call tell sequences apart within a row, which Transformers' own scans refuse."""
    return any(options.get(name) is not None for name in PACKED)


def fused_block(module: ModuleType, name: str) -> Callable:
    """Return what stands in for a function that runs a whole layer: None of it lets the layer call the single ones."""

    def fused(first, *args, **kwargs):
        if serving_scan(module, name, first.device.type) not in FOREIGN:
            return None
        return original_function(module, name)(first, *args, **kwargs)

    return fused


def kernel_or_reference(module: ModuleType, name: str) -> Callable:
    """Return what stands in for a function: its kernel where that can run, and else Transformers' reference."""
    original = original_function(module, name)
    reference = reference_of(original)

    def dispatch(tensor, *args, **kwargs):
        by_reference = foreign_kernel(module, name, tensor.device.type) is None and not is_packed(kwargs)
        return (reference if by_reference else original)(tensor, *args, **kwargs)

    return dispatch


def check_cached_state(state: torch.Tensor, expected: tuple[int, ...], axes: str) -> None:
    """Refuse a state that a step of generation does not fit: a kernel would read past the end of a tensor.

    Raises:
        ValueError: the state has another shape.
    """
    if state.shape != expected:
        raise ValueError(
            f"the cache holds states of shape {tuple(state.shape)}, a step of this layer needs {expected}, "
            f"({axes}): it was filled for another batch or before a cut. Start with an empty cache."
        )
