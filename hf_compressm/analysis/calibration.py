"""Calibration batches are taken and used here without disturbing the training they come from."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from .collate import SEQUENCES, Batch, as_batch, as_batches
from .own_state import OwnGenerators

logger = logging.get_logger(__name__)


def take_batches(
    batches: Iterable[dict],
    count: int,
    devices: Iterable[torch.device] = (),
    least: int | None = None,
) -> list[Batch]:
    """Return the first `count` batches; where there are fewer, all of them, with a warning.

    Args:
        batches: what is read; a DataLoader will do, and so will the rows of a data set.
        count: how many batches are wanted.
        devices: where the data may draw random numbers, besides the CPU; their random states are restored.
        least: how many batches are needed; `count` by default.

    Raises:
        ValueError: there are fewer batches than needed, or one is no batch, or has nothing to predict.
    """
    least = count if least is None else least
    with preserved_random_state(devices), _own_generators(batches).preserved():  # a DataLoader draws a seed at first
        given = islice(iter(as_batches(batches)), count)
        taken = [_check_batch(as_batch(batch, i), i) for i, batch in enumerate(given)]
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
    """Return the number of predictions that the loss of a batch with labels averages over."""
    return int(predictions(batch).sum())


def sequence_count(batch: Batch) -> int:
    """Return the number of sequences in a batch."""
    return len(next(batch[name] for name in SEQUENCES if name in batch))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in eval mode and without gradients, and leave no trace.

    The loss of a mixture of experts is then that of its predictions alone: how its routers spread the tokens is no
    matter of states.

    Afterwards modes, config and every random state that the model may have used are as before.
    """
    training, config = {module: module.training for module in model.modules()}, dict(vars(model.config))
    model.config.use_cache = False  # an analysis decodes nothing, and a cache of every layer would be built
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
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


def _check_batch(batch: Batch, position: int) -> Batch:
    if not is_usable(batch):
        raise ValueError(f"calibration batch {position} has no token to predict: all its labels are -100.")
    return batch


def is_usable(batch: Batch) -> bool:
    """Return whether there is something to predict in a batch, as far as can be told."""
    return "labels" not in batch or prediction_count(batch) > 0
