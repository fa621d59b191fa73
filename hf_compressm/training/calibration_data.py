"""This module says where the calibration batches of a run come from, event after event."""

from collections.abc import Iterable, Iterator

import torch
from transformers import TrainingArguments

from ..analysis.calibration import take_batches
from ..analysis.collate import Batch
from ..analysis.drawing import TrainingData
from ..analysis.own_state import OwnGenerators
from ..config import CompreSSMConfig

REMEDY = "Give the callback a calibration_loader: a list of batches, or a DataLoader of its own."


class CalibrationData:
    """The calibration data give the events of a run their batches, from a loader or drawn from the training data.

    Batches are drawn when the object is built, so that missing data is noticed before training; those of the training
    data twice, so that a state that draws would disturb is noticed, too. A stream is read then only, and serves every
    event with the same batches.

    Args:
        config: how many batches an event needs, and the seed by which they are drawn.
        args: the batch size, the device, and which of the processes this is.
        train_dataloader: the loader with the training data and what makes batches of it, or an iterable of batches.
        loader: an iterable of batches that is read from its beginning at every event, in place of the training data.

    Attributes:
        first_batches: the batches of step 0.

    Raises:
        ValueError: there is too little data, or it can be read only once, or not without disturbing training.
    """

    def __init__(
        self,
        config: CompreSSMConfig,
        args: TrainingArguments,
        train_dataloader: Iterable,
        loader: Iterable[dict] | None = None,
    ):
        check_loader(loader)
        self.config, self.args, self.loader = config, args, loader
        self._stream_batches: list[Batch] | None = None
        if loader is not None:
            self._generators = OwnGenerators(loader)
            self.first_batches = self.draw(step=0)
            return
        self._training_data = training_data(train_dataloader, args.per_device_train_batch_size)
        self.first_batches = self._draw_the_first_time()
        if not _are_equal(self.draw(step=0), self.first_batches):
            raise ValueError(
                "the training data give other calibration batches when these are drawn once more: the data set or its "
                "collator keeps a state that cannot be copied (a generator function's, a closure's, a file's), or "
                f"draws random numbers without a seed. Calibration would disturb training. {REMEDY}"
            )
        if self._training_data.is_stream:
            self._stream_batches = self.first_batches

    def draw(self, step: int) -> list[Batch]:
        """Return this process's batches for what happens after `step`; the same step draws the same."""
        if self._stream_batches is not None:
            return self._stream_batches
        count, devices = self.config.calibration_batches, [self.args.device]
        if self.loader is not None:
            with self._generators.rewound():
                return take_batches(self.loader, count, devices=devices, least=self.config.least_batches)
        processes = self.args.process_index, self.args.world_size
        return self._training_data.draw(count, self.config.calibration_seed, step, *processes, devices)

    def _draw_the_first_time(self) -> list[Batch]:
        try:
            return self.draw(step=0)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                "no calibration batches can be drawn from the training data "
                f"({type(error).__name__}: {error}). {REMEDY}"
            ) from error


def training_data(train_dataloader: Iterable, batch_size: int) -> TrainingData:
    """Return what calibration batches are drawn from, for whatever `get_train_dataloader` has returned.

    Args:
        train_dataloader: a DataLoader, one that gives out what its data set gives (batch_size=None), or anything that
            gives batches, by number or one after the other.
        batch_size: the number of examples in a batch that is drawn from a DataLoader.

    Raises:
        ValueError: it is an iterator, or nothing that gives batches.
    """
    if hasattr(train_dataloader, "dataset") and hasattr(train_dataloader, "collate_fn"):
        gives_batches = train_dataloader.batch_sampler is None
        loader = train_dataloader
        return TrainingData(loader.dataset, loader.collate_fn, None if gives_batches else batch_size)
    if isinstance(train_dataloader, Iterator) or not hasattr(train_dataloader, "__iter__"):
        raise ValueError(
            f"the training batches come from a {type(train_dataloader).__name__}, from which nothing can be drawn "
            f"that training would not miss. {REMEDY}"
        )
    return TrainingData(train_dataloader, _unchanged, None)


def _unchanged(batch):
    return batch


def _are_equal(left: list[Batch], right: list[Batch]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def check_loader(loader: Iterable[dict] | None) -> None:
    """Refuse a loader that only one event could read.

    Raises:
        ValueError: the loader is an iterator.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            "calibration_loader can be read only once, and every cut reads it: give a list or a DataLoader."
        )
