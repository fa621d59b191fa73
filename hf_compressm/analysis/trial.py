"""A trial runs the model once as an analysis will, before a training depends on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..architectures import StateLayers
from ..architectures.installed_scan import scan_installed
from ..config import CompreSSMConfig
from ..engines import can_run_unwrapped, raise_in_all_processes, sum_over_processes
from .calibration import undisturbed
from .checks import can_measure_losses, split_batches
from .collate import Batch
from .losses import mean_loss
from .measured import check_tokens
from .objective import Loss, Objective
from .states import sampled_positions


def try_analysis(layers: StateLayers, batches: list[Batch], config: CompreSSMConfig, loss: Loss | None = None) -> None:
    """Run forward passes as an analysis does, on as few batches as will do, and leave no trace.

    A model that is compiled and sharded is spared them: FSDP2 takes the first module that runs for the root.

    Args:
        batches: as for `analyze`.
        loss: as for `analyze`.

    Raises:
        ValueError: the model cannot be run so, or a layer not observed; a loss has to decide, and it is not known or
            not finite; the sequences are too short.
    """
    objective = Objective(layers.model, loss)
    statistics_batches, _, others = split_batches(layers, batches, config)
    with raise_in_all_processes():
        measures = can_measure_losses(config, objective, others)
    if not can_run_unwrapped(layers.model):
        return
    with undisturbed(layers.model), scan_installed():
        tokens = torch.zeros((), dtype=torch.float64, device=next(layers.model.parameters()).device)
        for batch in statistics_batches:
            with raise_in_all_processes():
                tokens += _observed_tokens(layers, batch)
            sum_over_processes([tokens])  # all processes have to run forward as often
            if tokens > 0:
                break
        if statistics_batches:
            check_tokens(int(tokens))
        if measures:
            with _explained(layers, others[0], "loss"):
                mean_loss(objective, others[:1], {})


def _observed_tokens(layers: StateLayers, batch: Batch) -> int:
    """Return at how many positions states were sampled.

    Raises:
        ValueError: the forward pass failed, or passed a layer by.
    """
    with _explained(layers, batch, "forward pass"):
        tokens = sampled_positions(layers, [batch])
    if len(set(map(bool, tokens.values()))) > 1:
        passed = [index for index, count in tokens.items() if count == 0]
        raise ValueError(
            f"a forward pass of {type(layers.model).__name__} does not run the scans of the layers {passed}: only "
            "models that run all their layers can be analysed."
        )
    return next(iter(tokens.values()))


@contextmanager
def _explained(layers: StateLayers, batch: Batch, what: str) -> Iterator[None]:
    """Turn whatever error a model or a loss raises within the block into one that says what was tried.

    Raises:
        ValueError: the block raised something.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        shapes = {name: tuple(value.shape) for name, value in batch.items()}
        raise ValueError(
            f"{type(layers.model).__name__} cannot be analysed: its {what} on a calibration batch of {shapes} failed "
            f"with {type(error).__name__}: {error}. Give batches as the model is trained on; in Trainer a "
            "calibration_loader of such, and callback.attach(trainer)."
        ) from error
