"""Check that a configuration fits a model, and give an analysis its batches."""

from collections.abc import Iterable, Sequence

from transformers.utils import logging

from ..architectures import StateLayers
from ..config import CompreSSMConfig
from ..engines import raise_in_all_processes, smallest_over_processes
from ..theory.criteria import criterion_name, taylor
from .calibration import take_batches
from .collate import Batch
from .losses import check_gradients
from .objective import Objective
from .recall import check_recall

logger = logging.get_logger(__name__)


def allocation_of(config: CompreSSMConfig, layers: StateLayers) -> str:
    """Return how sizes are allocated to layers: what the configuration says, or else what suits the architecture."""
    return config.allocation or ("per_layer" if layers.family.is_per_layer(layers.model) else "uniform")


def check_config(config: CompreSSMConfig, layers: StateLayers) -> None:
    """Refuse a configuration that does not fit the model.

    Raises:
        ValueError: the message names the option, what is allowed, and what the model is.
    """
    family, model_type = layers.family, layers.model.config.model_type
    uniform = allocation_of(config, layers) == "uniform"
    if not uniform:
        family.check_per_layer(layers.model)
    if config.skip_layers and (uniform or not set(config.skip_layers) < set(layers)):
        raise ValueError(
            f"skip_layers = {config.skip_layers}; allowed: some of the layers {list(layers)}, in a model where each "
            "may have a size of its own."
        )
    if config.basis is not None and config.basis not in family.bases:
        raise ValueError(
            f"basis = '{config.basis}'; a model of type '{model_type}' has {', '.join(family.bases)}: leave it out."
        )
    if config.criterion is not None and not family.criteria:
        raise ValueError(
            f"criterion = '{criterion_name(config.criterion)}'; the states of model type '{model_type}' are ranked by "
            "their Hankel singular values: leave it out."
        )
    if isinstance(config.criterion, str) and config.criterion not in family.criteria:
        raise ValueError(
            f"criterion = '{config.criterion}'; allowed for model type '{model_type}': {', '.join(family.criteria)}."
        )
    if config.refit and not family.can_refit:
        raise ValueError(f"refit = True; a model of type '{model_type}' is balanced instead: leave it out.")
    if config.allocation == "global" and not family.can_allocate_globally:
        raise ValueError(
            f"allocation = 'global'; the layers of model type '{model_type}' are reduced from their weights alone, "
            "without the losses that would compare them: allowed are 'per_layer' and 'uniform'."
        )
    if config.criterion is not None and criterion_name(config.criterion) == taylor.__name__:
        check_gradients(layers.model)
    if config.recall_pairs:
        check_recall(layers.model, config.recall_pairs)
    config.check_target(reducible_size(config, layers))


def reducible_size(config: CompreSSMConfig, layers: StateLayers) -> int:
    """Return the largest N among the layers that may be cut, or for a global allocation their mean."""
    sizes = [size for index, size in layers.sizes.items() if index not in config.skip_layers]
    return sum(sizes) // len(sizes) if config.allocation == "global" else max(sizes)


def split_batches(
    layers: StateLayers, batches: Iterable[dict] | None, config: CompreSSMConfig
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Return the batches for statistics, those that decide on refits, and those for losses, on the model's device.

    All processes call this together and get equally many: under FSDP2 each forward pass waits for those of the others.

    Raises:
        ValueError: batches are missing, too few, or of another kind.
    """
    with raise_in_all_processes():
        taken = _checked_batches(layers, batches, config)
    return _split(taken[: smallest_over_processes(len(taken))], layers, config)


def batch_counts(count: int, layers: StateLayers, config: CompreSSMConfig) -> tuple[int, int, int]:
    """Return how many of so many batches are for statistics, decide on refits, and are for losses."""
    statistics_batches, held_out, others = _split(range(count), layers, config)
    return len(statistics_batches), len(held_out), len(others)


def _split(batches: Sequence, layers: StateLayers, config: CompreSSMConfig) -> tuple[Sequence, Sequence, Sequence]:
    if not layers.family.needs_data:
        return [], [], batches
    return (batches[0::3], batches[1::3], batches[2::3]) if config.refit else (batches[0::2], [], batches[1::2])


def _checked_batches(layers: StateLayers, batches: Iterable[dict] | None, config: CompreSSMConfig) -> list[Batch]:
    model = layers.model
    if batches is None:
        if layers.family.needs_data:
            raise ValueError(f"batches = None; a model of type '{model.config.model_type}' is analysed on batches.")
        return []
    device = next(model.parameters()).device
    taken = take_batches(batches, config.calibration_batches, [device], config.least_batches)
    return [{name: value.to(device) for name, value in batch.items()} for batch in taken]


def can_measure_losses(config: CompreSSMConfig, objective: Objective, batches: list[Batch]) -> bool:
    """Return whether the loss that the model is trained for is known on these batches, and warn where it is not.

    Raises:
        ValueError: it is not known, and by the configuration a loss decides what is cut.
    """
    reason = objective.unknown_on(batches) if batches else "batches = None"
    if reason is None:
        return True
    if config.decided_by_loss:
        raise ValueError(
            f"{' and '.join(config.decided_by_loss)} needs the loss that the model is trained for, and {reason}: give "
            "batches with the labels that training uses, or the loss: analyze(…, loss=…); in Trainer call "
            "callback.attach(trainer), which asks Trainer for it."
        )
    if batches:
        logger.warning_once(f"No loss is measured, since {reason}. States are ranked without it.")
    return False
