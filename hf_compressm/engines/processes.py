"""By these functions several processes agree; in a single process they change nothing."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def process_count() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def all_processes(condition: bool) -> bool:
    """Return whether the condition holds in all processes."""
    conditions = [condition] * process_count()
    if process_count() > 1:
        dist.all_gather_object(conditions, condition)
    return all(conditions)


def smallest_over_processes(number: int) -> int:
    """Return the smallest of the numbers that the processes give."""
    numbers = [number] * process_count()
    if process_count() > 1:
        dist.all_gather_object(numbers, number)
    return min(numbers)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first_process(value: T) -> T:
    """Return the value of the first process in all of them; tensors in it have to be on the CPU."""
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def raise_in_all_processes() -> Iterator[None]:
    """Let all processes leave this block well, or all leave it with the error of those that failed.

    Nothing within the block may wait for other processes, but for the forward passes of a sharded model.

    Raises:
        ValueError: another process failed; a process that failed itself raises its own error.
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
