"""Batches to measure on, taken without disturbing the training they come from."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

Batch = dict[str, Tensor]
SEQUENCES = ("input_ids", "input_values")
MODEL_INPUTS = (*SEQUENCES, "attention_mask", "labels")


def take_batches(batches: Iterable[dict], count: int, own_labels: bool = True) -> list[Batch]:
    """The first `count` batches, each with `labels`.

    Args:
        own_labels: in a batch without labels, the tokens that are not padding are their own, as for a language model.

    Raises:
        ValueError: fewer batches than asked for, a batch without a sequence, or one with nothing to predict.
    """
    with preserved_random_state():  # a DataLoader draws a seed when it starts
        taken = [_checked(batch, i, own_labels) for i, batch in enumerate(islice(iter(batches), count))]
    if len(taken) < count:
        raise ValueError(
            f"the calibration data ended after {len(taken)} batches, {count} are needed: give more data (the callback "
            "takes a calibration_loader), or set calibration_batches lower (at least 2)."
        )
    return taken


def draw_batches(
    dataset, collate_fn, batch_size: int, count: int, seed: int, step: int, process: int = 0, processes: int = 1
) -> list[Batch]:
    """`count` batches of `batch_size` examples that depend on nothing but (seed, step), so that resuming is exact.

    Each of several processes gets its part of `processes` times as many examples.
    Batches without a token to predict are passed over. A stream cannot be reached at random: its first batches are
    taken, the same at every step.

    Raises:
        ValueError: too little data; a one-shot iterator, which training could not read again.
    """
    if is_stream(dataset):
        if iter(dataset) is dataset:
            raise ValueError("the training data can be read only once: give the callback its own calibration_loader.")
        examples = islice(DataLoader(dataset, batch_size, collate_fn=collate_fn), process, None, processes)
    else:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        order = torch.randperm(len(dataset), generator=generator)
        whole = len(order) // (processes * batch_size) * processes * batch_size
        own_batches = order[:whole].view(-1, processes, batch_size)[:, process]
        examples = (collate_fn([dataset[i] for i in batch.tolist()]) for batch in own_batches)
    return take_batches((batch for batch in examples if _is_usable(batch)), count)


def is_stream(dataset) -> bool:
    """Whether the data can only be iterated over."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def predictions(batch: Batch) -> Tensor:
    """Where a prediction counts in the loss: by next token, (batch, L - 1), or by sequence, (batch,)."""
    labels, tokens = batch["labels"], batch.get("input_ids")
    is_next_token = tokens is not None and labels.shape == tokens.shape
    return (labels[:, 1:] if is_next_token else labels) != -100


def prediction_count(batch: Batch) -> int:
    """Number of predictions that the loss of this batch averages over."""
    return int(predictions(batch).sum())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; afterwards modes, config and every random state are as before."""
    training, config = {module: module.training for module in model.modules()}, dict(vars(model.config))
    try:
        with preserved_random_state(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        vars(model.config).update(config)  # a loss may have noted the kind of its labels there


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Random states of Python, NumPy and torch as before, whatever the block draws."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _checked(given: dict, position: int, own_labels: bool) -> Batch:
    batch = {name: given[name] for name in MODEL_INPUTS if given.get(name) is not None}
    batch = _with_labels(batch) if own_labels else batch
    if "labels" not in batch or not any(name in batch for name in SEQUENCES):
        wanted = "input_ids (and may have labels)" if own_labels else "input_ids or input_values, and labels"
        raise ValueError(f"calibration batch {position} has {sorted(given)}; it needs {wanted}.")
    if prediction_count(batch) == 0:
        raise ValueError(f"calibration batch {position} has no token to predict: all its labels are -100.")
    return batch


def _is_usable(batch: dict) -> bool:
    batch = _with_labels(batch)
    return "labels" not in batch or prediction_count(batch) > 0


def _with_labels(batch: dict) -> dict:
    """The batch; without labels, the tokens that are not padding become them."""
    if batch.get("labels") is not None or "input_ids" not in batch:
        return batch
    mask = batch.get("attention_mask")
    labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)
    return {**batch, "labels": labels}
