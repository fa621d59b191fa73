"""The loss that a Trainer trains by is asked of the Trainer itself; without it, it is compared with what is logged."""

import copy
from collections import deque

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from ..analysis.calibration import prediction_count, sequence_count
from ..analysis.collate import Batch
from ..analysis.objective import Loss

DATA = ("train_dataset", "eval_dataset")
FAR_FACTOR, FAR_NATS = 1.5, 0.5  # a logged loss is an average over earlier steps, and so rather above what is measured


class TrainerLoss:
    """A Trainer's loss is what its `compute_loss` returns for a batch; to be asked leaves no trace in the Trainer.

    A `compute_loss` of the user's own may keep metrics, or log. It is called on a copy of the Trainer that has
    containers of its own and logs nothing.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = copy.copy(trainer)
        for name, value in vars(trainer).items():
            if name not in DATA:
                setattr(self._trainer, name, _copy_of_containers(value))
        self._trainer.log = lambda *arguments, **options: None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean loss of a batch and the number of its predictions or, without labels, of its sequences."""
        trainer, options = self._trainer, {}
        count = prediction_count(batch) if "labels" in batch else sequence_count(batch)
        if trainer.compute_loss_func is not None:  # Trainer multiplies what such a function returns by the processes
            processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
            options["num_items_in_batch"] = torch.tensor(count * processes, device=next(model.parameters()).device)
        return trainer.compute_loss(model, batch, **options), count


def loss_of_trainer(trainer: Trainer | None, batch: Batch, is_training_data: bool) -> Loss | None:
    """Return the loss that a Trainer trains by; None where it is the model's own loss of a batch with labels.

    Args:
        trainer: the Trainer, if it is known.
        batch: a calibration batch.
        is_training_data: whether that batch is one that the Trainer may train on.
    """
    if trainer is None or (has_usual_loss(trainer) and ("labels" in batch or not is_training_data)):
        return None
    return TrainerLoss(trainer)


def has_usual_loss(trainer: Trainer) -> bool:
    """Return whether a Trainer trains by the loss that the model returns."""
    is_overridden = type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)
    return not is_overridden and trainer.compute_loss_func is None and trainer.label_smoother is None


def another_loss(measured: float | None, state: TrainerState) -> str | None:
    """Return why a measured loss cannot be the one that is trained; None where it may be.

    Args:
        measured: the mean loss of the model on batches of the training data, if it was measured.
        state: what was logged.
    """
    logged = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
    if measured is None or logged is None or measured <= FAR_FACTOR * max(logged, 0.0) + FAR_NATS:
        return None
    return (
        f"the model's own loss is {measured:.4f} on batches of the training data, and Trainer logged {logged:.4f}: it "
        "trains by another loss"
    )


def _copy_of_containers(value):
    """Return a value with copies of all dicts, lists, sets and deques in it, and everything else as it is."""
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, held in value.items():
            copied[key] = _copy_of_containers(held)
        return copied
    if type(value) is list:
        return [_copy_of_containers(held) for held in value]
    return copy.copy(value) if isinstance(value, set | deque) else value
