"""Calibration batches are drawn here from training data, as if nothing had been drawn."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import IterableDataset

from .calibration import is_usable, take_batches
from .collate import Batch, as_batch
from .own_state import OwnGenerators, copy_of
from .permutation import permutation


class TrainingData:
    """Training data give calibration batches and keep their own state, and that of the collator, as training left it.

    The batches of a step are always the same: draws go through copies of what the data and the collator were when this
    was built, and random generators that they hold start from where they stood.

    Args:
        dataset: what training reads: examples by number, or a stream of them.
        collate_fn: list of examples → batch.
        batch_size: the number of examples in a batch; None where each example is a batch.
    """

    def __init__(self, dataset, collate_fn: Callable, batch_size: int | None):
        self._generators = OwnGenerators(dataset, collate_fn)
        self._dataset, self._collate_fn, self._batch_size = copy_of(dataset), copy_of(collate_fn), batch_size

    def draw(
        self,
        count: int,
        seed: int,
        step: int,
        process: int = 0,
        processes: int = 1,
        devices: Iterable[torch.device] = (),
    ) -> list[Batch]:
        """Draw batches as `draw_batches` does, and disturb nothing."""
        with self._generators.rewound():
            source = copy_of(self._dataset), copy_of(self._collate_fn), self._batch_size
            return draw_batches(*source, count, seed, step, process, processes, devices)

    @property
    def is_stream(self) -> bool:
        """Return whether the first batches are drawn at every step, for want of random access."""
        return is_stream(self._dataset)


def draw_batches(
    dataset,
    collate_fn: Callable,
    batch_size: int | None,
    count: int,
    seed: int,
    step: int,
    process: int = 0,
    processes: int = 1,
    devices: Iterable[torch.device] = (),
) -> list[Batch]:
    """Draw batches that depend on nothing but (seed, step), so that resuming is exact.

    Batches without a token to predict are passed over. A stream has no random access: its first batches are taken, the
    same at every step.

    Args:
        dataset: what training reads: examples by number, or a stream of them.
        collate_fn: list of examples → batch; or example → batch, where each example is a batch.
        batch_size: the number of examples in a batch; None where each example is a batch.
        count: how many batches each process draws.
        seed: the seed of the draw, together with `step`.
        step: optimizer steps done.
        process: which of the processes this is, from 0.
        processes: how many draw, each its own part of `processes` times as many examples.
        devices: as for `take_batches`.

    Raises:
        ValueError: there is too little data.
    """
    if is_stream(dataset):
        drawn = islice(_first_batches(dataset, batch_size), process, None, processes)
    else:
        numbers = _random_batches(len(dataset), batch_size or 1, seed, step, process, processes)
        drawn = ([dataset[number] for number in batch] for batch in numbers)
    collated = (collate_fn(examples if batch_size else examples[0]) for examples in drawn)
    batches = (as_batch(batch, i) for i, batch in enumerate(collated))
    return take_batches(filter(is_usable, batches), count, devices=devices)


def is_stream(dataset) -> bool:
    """Return whether the data can only be iterated over."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def _first_batches(stream: Iterable, batch_size: int | None) -> Iterator[list]:
    """Yield lists of examples, as they come."""
    examples = iter(stream)
    while batch := list(islice(examples, batch_size or 1)):
        yield batch


def _random_batches(
    examples: int, batch_size: int, seed: int, step: int, process: int, processes: int
) -> Iterator[list[int]]:
    """Yield numbers of examples by batch; in each round every process gets the next batch of one permutation."""
    order = permutation(examples, torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63))
    for _ in range(examples // (processes * batch_size)):
        of_all = list(islice(order, processes * batch_size))
        yield of_all[process * batch_size : (process + 1) * batch_size]
