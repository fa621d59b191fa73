"""This module says where the calibration batches of a run come from, event after event."""

from collections.abc import Iterable, Iterator

from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ..analysis.calibration import Batch, draw_batches, is_stream, take_batches
from ..config import CompreSSMConfig


class CalibrationData:
    """The calibration data give the events of a run their batches, from a loader or drawn from the training data.

    Batches are drawn once when the object is built, so that missing data is noticed before training. A stream is read
    then only, before training reads it, and serves every event with the same batches.

    Args:
        config: how many batches an event needs, and the seed by which they are drawn.
        args: the batch size, the device, and which of the processes this is.
        train_dataloader: the loader with the training data and what makes batches of it.
        loader: an iterable of batches that is read from its beginning at every event, in place of the training data.

    Raises:
        ValueError: there is too little data, or it can be read only once.
    """

    def __init__(
        self,
        config: CompreSSMConfig,
        args: TrainingArguments,
        train_dataloader: DataLoader,
        loader: Iterable[dict] | None = None,
    ):
        check_loader(loader)
        self.config, self.args, self.train_dataloader, self.loader = config, args, train_dataloader, loader
        self._stream_batches: list[Batch] | None = None
        batches = self.draw(step=0)
        if loader is None and is_stream(train_dataloader.dataset):
            self._stream_batches = batches

    def draw(self, step: int) -> list[Batch]:
        """Return this process's batches for what happens after `step`; the same step draws the same."""
        if self._stream_batches is not None:
            return self._stream_batches
        count, devices = self.config.calibration_batches, [self.args.device]
        if self.loader is not None:
            return take_batches(self.loader, count, devices=devices)
        return draw_batches(
            self.train_dataloader.dataset,
            self.train_dataloader.collate_fn,
            self.args.per_device_train_batch_size,
            count,
            self.config.calibration_seed,
            step,
            self.args.process_index,
            self.args.world_size,
            devices,
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
