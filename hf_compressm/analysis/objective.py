"""An objective is the loss that a model is trained for; it is computed here with some parameters overridden.

It is the model's own loss, of a batch that has labels, or any function of a model and a batch: what training minimises
has to be known, since sizes chosen by another loss cannot be taken back.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engines import run_with
from .calibration import prediction_count
from .collate import MODEL_INPUTS, Batch

Loss = Callable[[nn.Module, Batch], tuple[Tensor, float]]  # → mean loss of the batch, and how many terms it has
HALVES = (torch.float16, torch.bfloat16)


class Objective:
    """An objective computes the loss that an unwrapped model is trained for.

    Args:
        model: the model, in eval mode whenever the objective runs it.
        loss: model, batch → mean loss, a scalar, and the number of terms that it is the mean of. By default it is the
            model's own, over predictions.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None):
        self.model, self.own = model, loss is None
        self._loss = model_loss if loss is None else loss

    def loss(self, batch: Batch, overrides: Mapping[str, Tensor | int]) -> tuple[Tensor, float]:
        """Return the mean loss of a batch, and of how many terms, with some parameters, by name, overridden.

        Raises:
            ValueError: the loss is no scalar.
        """
        loss, count = run(self.model, lambda: self._loss(self.model, dict(batch)), overrides)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss of a batch is of {given}; allowed: a tensor with one element, the mean.")
        return loss.reshape(()), count

    def unknown_on(self, batches: list[Batch]) -> str | None:
        """Return why the loss of these batches is not known; None where it is, as that of any is to a function."""
        if not self.own:
            return None
        if "labels" not in _arguments(self.model):
            return f"{type(self.model).__name__} computes none"
        if any("labels" not in batch for batch in batches):
            return "the calibration batches have no labels"
        if all(map(_is_shifted, batches)):
            return "the labels are the next tokens already, which the model's own loss would shift once more"
        return None


def model_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the loss that a model itself computes of a batch with labels, and the number of its predictions.

    Raises:
        ValueError: the model returns no loss.
    """
    loss = output_of(model_outputs(model, batch), "loss")
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returns no loss for a batch of {', '.join(batch)}: give analyze(loss=…)."
        )
    return loss, prediction_count(batch)


def model_outputs(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a model forward on what it takes of a batch, and return its outputs: a mapping, or a tuple."""
    return model(**{name: value for name, value in batch.items() if name in _arguments(model)})


def output_of(outputs: Any, name: str) -> Tensor | None:
    """Return the loss or the logits among the outputs of a model that was given labels."""
    return outputs.get(name) if isinstance(outputs, Mapping) else outputs[("loss", "logits").index(name)]


def run(model: nn.Module, function: Callable[[], Any], overrides: Mapping[str, Tensor | int]) -> Any:
    """Call a function that runs a model with some parameters overridden; half-precision weights are float32."""
    halves = {name: parameter.float() for name, parameter in model.named_parameters() if parameter.dtype in HALVES}
    given = {name: value.float() if name in halves else value for name, value in overrides.items()}
    return run_with(model, function, halves | given)


def _is_shifted(batch: Batch) -> bool:
    """Return whether each label is the next token, and not the token itself, as a causal language model takes it."""
    tokens, labels = batch.get("input_ids"), batch["labels"]
    if tokens is None or labels.shape != tokens.shape or tokens.ndim != 2:
        return False
    counted = labels[:, :-1] != -100
    of_next, of_same = ((labels[:, :-1] == some)[counted] for some in (tokens[:, 1:], tokens[:, :-1]))
    return bool(counted.any() and of_next.all() and not of_same.all())


def _arguments(model: nn.Module) -> set[str]:
    """Return what a forward pass of the model takes by name; where it takes anything, the inputs of all models."""
    arguments = inspect.signature(model.forward).parameters
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
    return set(arguments) | set(MODEL_INPUTS if takes_any else ())
