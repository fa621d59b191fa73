"""Calibration batches are taken and used here without disturbing the training they come from."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from .collate import MODEL_INPUTS, SEQUENCES, Batch, as_batch, as_batches
from .own_state import OwnGenerators

logger = logging.get_logger(__name__)


def take_batches(
    batches: Iterable[dict],
    count: int,
    own_labels: bool = True,
    devices: Iterable[torch.device] = (),
    least: int | None = None,
) -> list[Batch]:
    """Return the first `count` batches, each with `labels`; where there are fewer, all of them, with a warning.

    Args:
        batches: what is read; a DataLoader will do, and so will the rows of a data set.
        count: how many batches are wanted.
        own_labels: whether a batch without labels gets its own tokens as labels, but for padding, as it suits a
            language model.
        devices: where the data may draw random numbers, besides the CPU; their random states are restored.
        least: how many batches are needed; `count` by default.

    Raises:
        ValueError: there are fewer batches than needed, or one is no batch, or has no sequence or nothing to predict.
    """
    least = count if least is None else least
    with preserved_random_state(devices), _own_generators(batches).preserved():  # a DataLoader draws a seed at first
        given = islice(iter(as_batches(batches)), count)
        taken = [_check_batch(as_batch(batch, i), i, own_labels) for i, batch in enumerate(given)]
    if len(taken) < least:
        lower = ", or set calibration_batches lower (at least 2)" if least == count else ""
        raise ValueError(
            f"the calibration data ended after {len(taken)} batches, {least} are needed: give more data (the callback "
            f"takes a calibration_loader){lower}."
        )
    if len(taken) < count:
        logger.warning_once(
            f"The calibration data hold {len(taken)} batches, calibration_batches = {count}: all of them are taken."
        )
    return taken


def _own_generators(batches) -> OwnGenerators:
    """Return the random generators of what can be read again; an iterator goes on, and so do its generators."""
    return OwnGenerators(*([] if isinstance(batches, Iterator) else [batches]))


def predictions(batch: Batch) -> Tensor:
    """Return where a prediction counts in the loss: by next token, (batch, L - 1), or by sequence, (batch,)."""
    labels, tokens = batch["labels"], batch.get("input_ids")
    is_next_token = tokens is not None and labels.shape == tokens.shape
    return (labels[:, 1:] if is_next_token else labels) != -100


def prediction_count(batch: Batch) -> int:
    """Return the number of predictions that the loss of this batch averages over."""
    return int(predictions(batch).sum())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in eval mode and without gradients, and leave no trace.

    Afterwards modes, config and every random state that the model may have used are as before.
    """
    training, config = {module: module.training for module in model.modules()}, dict(vars(model.config))
    try:
        with preserved_random_state({parameter.device for parameter in model.parameters()}), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        vars(model.config).update(config)  # a loss may have written the kind of its labels there


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


def _check_batch(given: dict, position: int, own_labels: bool) -> Batch:
    batch = {name: given[name] for name in MODEL_INPUTS if given.get(name) is not None}
    batch = _add_labels(batch) if own_labels else batch
    if "labels" not in batch or not any(name in batch for name in SEQUENCES):
        wanted = "input_ids (and may have labels)" if own_labels else "input_ids or input_values, and labels"
        raise ValueError(f"calibration batch {position} has {sorted(given)}; it needs {wanted}.")
    if prediction_count(batch) == 0:
        raise ValueError(f"calibration batch {position} has no token to predict: all its labels are -100.")
    return batch


def is_usable(batch: dict) -> bool:
    """Return whether there is something to predict in a batch, as far as can be told."""
    batch = _add_labels(batch)
    return "labels" not in batch or prediction_count(batch) > 0


def _add_labels(batch: dict) -> dict:
    """Return the batch with labels; where it has none, its tokens become them, but for padding."""
    if batch.get("labels") is not None or "input_ids" not in batch:
        return batch
    mask = batch.get("attention_mask")
    labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)
    return {**batch, "labels": labels}
