"""Calibration batches are taken and used here without disturbing the training they come from."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .permutation import permutation

Batch = dict[str, Tensor]
SEQUENCES = ("input_ids", "input_values")
MODEL_INPUTS = (*SEQUENCES, "attention_mask", "labels")


def take_batches(batches: Iterable[dict], count: int, devices: Iterable[torch.device] = ()) -> list[Batch]:
    """Return the first `count` batches.

    Args:
        batches: what is read; a DataLoader will do.
        count: how many batches are needed.
        devices: where the data may draw random numbers, besides the CPU; their random states are restored.

    Raises:
        ValueError: there are fewer batches than asked for, or a batch has nothing to predict.
    """
    with preserved_random_state(devices):  # a DataLoader draws a seed when it starts
        taken = [_check_batch(batch, i) for i, batch in enumerate(islice(iter(batches), count))]
    if len(taken) < count:
        raise ValueError(
            f"the calibration data ended after {len(taken)} batches, {count} are needed: give more data (the callback "
            "takes a calibration_loader), or set calibration_batches lower (at least 2)."
        )
    return taken


def draw_batches(
    dataset,
    collate_fn,
    batch_size: int,
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
        collate_fn: list of examples → batch.
        batch_size: examples in a batch.
        count: how many batches each process draws.
        seed: the seed of the draw, together with `step`.
        step: optimizer steps done.
        process: which of the processes this is, from 0.
        processes: how many draw, each its own part of `processes` times as many examples.
        devices: as for `take_batches`.

    Raises:
        ValueError: there is too little data, or it is a one-shot iterator, which training could not read again.
    """
    if is_stream(dataset):
        if iter(dataset) is dataset:
            raise ValueError("the training data can be read only once: give the callback its own calibration_loader.")
        drawn = islice(DataLoader(dataset, batch_size, collate_fn=collate_fn), process, None, processes)
    else:
        numbers = _random_batches(len(dataset), batch_size, seed, step, process, processes)
        drawn = (collate_fn([dataset[number] for number in batch]) for batch in numbers)
    return take_batches((batch for batch in drawn if _has_predictions(batch)), count, devices=devices)


def _random_batches(
    examples: int, batch_size: int, seed: int, step: int, process: int, processes: int
) -> Iterator[list[int]]:
    """Yield numbers of examples by batch; in each round every process gets the next batch of one permutation."""
    order = permutation(examples, torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63))
    for _ in range(examples // (processes * batch_size)):
        of_all = list(islice(order, processes * batch_size))
        yield of_all[process * batch_size : (process + 1) * batch_size]


def is_stream(dataset) -> bool:
    """Return whether the data can only be iterated over."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def predictions(batch: Batch) -> Tensor:
    """Return where a prediction counts in the loss: by next token, (batch, L - 1), or by sequence, (batch,)."""
    labels, tokens = batch["labels"], batch.get("input_ids")
    is_next_token = tokens is not None and labels.shape == tokens.shape
    return (labels[:, 1:] if is_next_token else labels) != -100


def prediction_count(batch: Batch) -> int:
    """Return the number of predictions that the loss of a batch with labels averages over."""
    return int(predictions(batch).sum())


def sequence_count(batch: Batch) -> int:
    """Return the number of sequences in a batch."""
    return len(batch[next((name for name in (*SEQUENCES, "labels") if name in batch), next(iter(batch)))])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in eval mode and without gradients, and leave no trace.

    Afterwards modes, config and every random state that the model may have used are as before.
    """
    training, config = {module: module.training for module in model.modules()}, dict(vars(model.config))
    model.config.use_cache = False  # an analysis decodes nothing, and a cache of every layer would be built
    try:
        with preserved_random_state({parameter.device for parameter in model.parameters()}), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        vars(model.config).clear()  # a loss may have written the kind of its labels there
        vars(model.config).update(config)


@contextmanager
def preserved_random_state(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the block, whatever it drew.

    Args:
        devices: where torch may draw, besides the CPU; others are not asked, since that would initialise them.
    """
    accelerators = {device for device in devices if device.type != "cpu"}
    kind = next((device.type for device in accelerators), "cuda")  # torch needs one kind, even for no device
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(accelerators, device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _check_batch(given: dict, position: int) -> Batch:
    batch = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if not _has_predictions(batch):
        raise ValueError(f"calibration batch {position} has no token to predict: all its labels are -100.")
    return batch


def _has_predictions(batch: dict) -> bool:
    return "labels" not in batch or prediction_count(batch) > 0
