"""This module tells whose kernel a function of a model of Transformers calls.

By `use_kernel_func_from_hub_with_fallback` each of these functions calls a kernel from the Hub where a model asked for
it (`use_kernels=True`), else that of a package that was there at import (mamba-ssm, causal-conv1d), else its own loop.
Where the package `kernels` is installed, the function is a module that all layers share, whose `forward` is replaced.
"""

import inspect
from collections.abc import Callable

from torch import nn


def kernel_of(function: Callable, device_type: str) -> str | None:
    """Return whose kernel the function calls for tensors on this kind of device, "hub" or "mamba_ssm", or None.

    Kernels of the Hub are for any kind of device but a CPU, those of packages for CUDA alone.
    """
    if device_type != "cpu" and _is_of_the_hub(function):
        return "hub"
    return "mamba_ssm" if device_type == "cuda" and _has_package(function) else None


def can_take_kernels(function: Callable) -> bool:
    """Return whether a model with `use_kernels=True` could give this function a kernel from the Hub."""
    return isinstance(function, nn.Module)


def reference_of(function: Callable) -> Callable:
    """Return the loop of Transformers, which runs anywhere."""
    return inspect.unwrap(_chooser(function))


def _is_of_the_hub(function: Callable) -> bool:
    return can_take_kernels(function) and function.forward.__func__ is not type(function).forward


def _has_package(function: Callable) -> bool:
    chooser = _chooser(function)
    implementation = (
        inspect.getclosurevars(chooser).nonlocals.get("implementation") if inspect.isfunction(chooser) else None
    )
    return implementation is not None and implementation is not reference_of(function)


def _chooser(function: Callable) -> Callable:
    """Return Transformers' wrapper of its loop, which calls the package's kernel in its place where there is one."""
    return inspect.getclosurevars(type(function).forward).nonlocals["func"] if can_take_kernels(function) else function
