"""Data sets and collators may keep a state of their own; through copies it stays as training left it.

A packing buffer, an iterator that goes on where it stopped and a random generator are such states.
"""

import logging
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from gc import get_referents
from types import CodeType, FunctionType, GeneratorType, ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

T = TypeVar("T")
Generator = random.Random | np.random.Generator | np.random.RandomState | torch.Generator

LONG = 1000  # entries; a container that long is data, and a buffer is empty when training starts
LARGE = 2**20  # bytes; so is an array that large
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
ARRAYS = (Tensor, np.ndarray)
WHOLE = (ModuleType, nn.Module, torch.optim.Optimizer, PreTrainedTokenizerBase, Trainer, logging.Logger)
TABLES = ("pyarrow", "pandas", "polars")  # packages whose objects are data
HUGGING_FACE = ("transformers", "datasets", "accelerate", "tokenizers")
LIBRARIES = (*sys.stdlib_module_names, *TABLES, *HUGGING_FACE, "torch", "numpy")


class OwnGenerators:
    """These are the random generators that data and collators hold themselves, and their states when this was built.

    Functions hold those that their closures or global names refer to.

    Args:
        holders: data sets, collate functions, loaders.
    """

    def __init__(self, *holders):
        found = [part for part in reachable(*holders) if isinstance(part, Generator)]
        self._generators = [each for each in found if not isinstance(each, random.SystemRandom)]
        self._first = self._states()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore after the block the states from before it."""
        now = self._states()
        try:
            yield
        finally:
            self._set(now)

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Run the block with the first states, and restore those from before it."""
        with self.preserved():
            self._set(self._first)
            yield

    def _states(self) -> list:
        return list(map(_state, self._generators))

    def _set(self, states: list) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            _set_state(generator, state)


def copy_of(holder: T) -> T:
    """Return a deep copy that shares data (tables, models, long lists, large arrays) with what is copied.

    What cannot be copied, since it holds a file or a generator function's iterator, say, is returned itself.
    """
    shared = {id(part): part for part in reachable(holder) if _is_data(part)}
    try:
        return deepcopy(holder, shared)
    except Exception:  # whatever the objects of others raise
        return holder


def reachable(*roots) -> list:
    """Return all objects that these are made of, themselves included; data are not opened."""
    found, waiting = {}, list(roots)
    while waiting:
        part = waiting.pop()
        if id(part) not in found:
            found[id(part)] = part
            waiting.extend(_parts(part))
    return list(found.values())


def _parts(part) -> list:
    """Return what an object refers to, where a state may lie."""
    if _is_data(part) or isinstance(part, (*ARRAYS, Generator, GeneratorType)) or _is_of_library(part):
        return []
    if isinstance(part, FunctionType):
        named = [part.__globals__[name] for name in _names(part.__code__) if name in part.__globals__]
        return [*named, part.__closure__, part.__defaults__, part.__kwdefaults__]
    return get_referents(part)


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes that a function uses, comprehensions in it included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_of_library(part) -> bool:
    """Return whether this is a class or function of a package that keeps no state there."""
    return isinstance(part, (type, FunctionType)) and package_of(part) in LIBRARIES


def _is_data(part) -> bool:
    if isinstance(part, ARRAYS):
        return part.nbytes > LARGE
    return (
        isinstance(part, WHOLE)
        or (isinstance(part, CONTAINERS) and len(part) > LONG)
        or package_of(type(part)) in TABLES
    )


def package_of(thing: type | FunctionType) -> str:
    """Return the name of the package that defines a class or a function."""
    return (thing.__module__ or "").partition(".")[0]


def _state(generator: Generator):
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _set_state(generator: Generator, state) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
