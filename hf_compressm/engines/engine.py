"""One small interface covers all ways in which a model's parameters are held while it trains."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .data_parallel import data_parallel_wrapper, rebuild, wrapper_restorer
from .parameters import new_parameter_like
from .sharded import groups_restorer, is_sharded, replace_sharded, run_sharded
from .wrappers import unwrap


class Engine:
    """An engine replaces parameters of a model, and lets everything that was built for the old ones know.

    Args:
        model: the model with its wrappers; in a single process and from Trainer, the model itself.
        trains: False for a model beside the one that trains, which nothing has to synchronise.

    Attributes:
        model: the Transformers model without its wrappers.

    Raises:
        ValueError: the model is held by an engine that is not served.
    """

    def __init__(self, model: nn.Module, trains: bool = True):
        self.model = unwrap(model)
        self._is_sharded = is_sharded(self.model)
        self._wrapper = data_parallel_wrapper(model) if trains and not self._is_sharded else None

    def replace(self, module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
        """Put a new Parameter that holds `value` in the place of `module`'s own parameter `name`, and return it."""
        old = module._parameters[name]
        if self._is_sharded:
            return replace_sharded(self.model, old, value)
        new = new_parameter_like(old, value)
        module._parameters[name] = new
        return new

    def finish(self) -> None:
        """Let everything that was built for the old parameters know the new ones."""
        if self._wrapper is not None:
            rebuild(self._wrapper)
        forget_compiled_code()

    def restorer(self) -> Callable[[], None]:
        """Return a function that undoes `replace` and `finish` once the modules have their old parameters again."""
        if self._is_sharded:
            return groups_restorer(self.model)
        return wrapper_restorer(self._wrapper) if self._wrapper is not None else lambda: None


def run_with(model: nn.Module, function: Callable[[], Any], overrides: Mapping[str, Tensor | int]) -> Any:
    """Call a function that runs an unwrapped model forward, with some of its parameters, by name, overridden.

    A number overrides an attribute of a module, such as the size at which it computes.
    """
    run = run_sharded if is_sharded(model) else _run_whole
    tensors = {name: value for name, value in overrides.items() if isinstance(value, Tensor)}
    with _attributes(model, {name: value for name, value in overrides.items() if name not in tensors}):
        return run(model, function, tensors)


@contextmanager
def _attributes(model: nn.Module, values: Mapping[str, int]) -> Iterator[None]:
    """Give modules other attributes, by name in the model, within this block."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in values}
    before = {name: getattr(owner, name.rpartition(".")[2]) for name, owner in owners.items()}
    try:
        for name, value in values.items():
            setattr(owners[name], name.rpartition(".")[2], value)
        yield
    finally:
        for name, value in before.items():
            setattr(owners[name], name.rpartition(".")[2], value)


def forget_compiled_code() -> None:
    """Let torch.compile start anew, since after eight recompilations for new sizes it stays in eager mode."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _run_whole(model: nn.Module, function: Callable[[], Any], overrides: Mapping[str, Tensor]) -> Any:
    # By `functional_call` of torch a module that has two names in the model would be left with the overriding tensor.
    values = {model.get_parameter(name): value for name, value in overrides.items()}
    overridden = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in values
    ]
    try:
        for parameters, name, parameter in overridden:
            parameters[name] = values[parameter]
        return function()
    finally:
        for parameters, name, parameter in overridden:
            parameters[name] = parameter
