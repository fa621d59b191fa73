"""What is brought as a batch becomes one here: rows of a data set, lists, NumPy arrays, whole numbers of any kind."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]
SEQUENCES = ("input_ids", "input_values")
MODEL_INPUTS = (*SEQUENCES, "attention_mask", "labels")
A_BATCH = (
    "A batch is a dict with input_ids or input_values, and where they are wanted attention_mask and labels. Each is a "
    "tensor, a NumPy array or lists of equal length, of shape (sequences, positions), or (positions,) for one sequence"
)


def as_batches(batches) -> Iterable:
    """Return the batches if they can be iterated over, one after another.

    Raises:
        ValueError: they are a single batch or several data sets, or nothing that can be iterated over.
    """
    if isinstance(batches, Mapping):
        raise ValueError(
            f"batches = a {type(batches).__name__} of {sorted(map(str, batches))}; allowed: an iterable of batches. "
            "Put a single batch into a list; of a DatasetDict give one split."
        )
    if isinstance(batches, (str, bytes)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise ValueError(f"batches = {batches!r:.60}; allowed: an iterable of batches. {A_BATCH}.")
    return batches


def as_batch(given, position: int) -> Batch:
    """Return a batch as a dict of tensors.

    Whole numbers become int64, Python's and NumPy's floats have torch's default precision. A single sequence becomes a
    batch of one. What is neither an input of a model nor numbers, such as a column of text, is left out.

    Args:
        given: a dict, or anything like it, of tensors, arrays or lists.
        position: the number of the batch, from 0, for the error.

    Raises:
        ValueError: it is no batch; the error says what a batch is.
    """
    where = f"calibration batch {position}"
    if isinstance(given, (str, bytes)):
        raise ValueError(f"{where} is text: tokenise it. {A_BATCH}.")
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where} is a {type(given).__name__}: let a collate function make dicts of the examples. {A_BATCH}."
        )
    batch = {}
    for name, value in given.items():
        if value is None:
            continue
        try:
            batch[name] = _as_tensor(value)
        except ValueError as error:
            if name in MODEL_INPUTS:
                raise ValueError(f"{where} has {name} that cannot be used: {error}. {A_BATCH}.") from error
    if not any(name in batch for name in SEQUENCES):
        text = [name for name, value in given.items() if _is_text(value)]
        remedy = f"tokenise {text[0]}" if text else "it needs input_ids or input_values"
        raise ValueError(f"{where} has {sorted(map(str, given))}: {remedy}. {A_BATCH}.")
    if "input_ids" in batch and batch["input_ids"].dtype != torch.int64:
        raise ValueError(f"{where} has input_ids of {batch['input_ids'].dtype}, but ids are whole numbers. {A_BATCH}.")
    return {name: value[None] for name, value in batch.items()} if _is_row(batch) else batch


def _as_tensor(value) -> Tensor:
    """Return numbers as a tensor.

    Raises:
        ValueError: they are no numbers, ragged, or columns of a batch; the message says which.
    """
    if not isinstance(value, Tensor):
        is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        if is_list and any(isinstance(entry, Tensor) and entry.ndim for entry in value):
            raise ValueError(
                "it is a list of tensors, as a DataLoader makes of lists, position by position: give the DataLoader "
                "collate_fn=default_data_collator"
            )
        try:
            array = np.array(list(value) if is_list else value, order="C")
        except ValueError as error:
            raise ValueError("its sequences are of different lengths: pad them") from error
        try:
            value = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise ValueError("it does not hold numbers") from error
        if value.dtype == torch.float64:  # which NumPy makes of every float
            value = value.to(torch.get_default_dtype())
    is_whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return value.to(torch.int64) if is_whole else value


def _is_row(batch: Batch) -> bool:
    """Return whether the entries belong to one sequence, not to a batch of them."""
    sequence = next(batch[name] for name in SEQUENCES if name in batch)
    return sequence.ndim == 1 or ("labels" in batch and batch["labels"].ndim == 0)


def _is_text(value) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return isinstance(value[0] if is_list else value, str)
