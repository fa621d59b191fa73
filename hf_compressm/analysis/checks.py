"""Which analysis a model gets, on which batches, and whether a configuration fits it."""

import inspect
from collections.abc import Iterable

from torch import nn

from ..architectures.family import SelectiveLayout, layout_of, state_sizes
from ..architectures.state_sizes import check_per_layer
from ..config import CompreSSMConfig
from ..theory.criteria import criterion_name, taylor
from .calibration import Batch, take_batches
from .losses import check_gradients
from .recall import check_recall


def allocation_of(config: CompreSSMConfig, model: nn.Module) -> str:
    """How sizes are allocated to layers: what the configuration says, or else what suits the architecture."""
    return config.allocation or ("per_layer" if layout_of(model).per_layer_by_default else "uniform")


def check_config(config: CompreSSMConfig, model: nn.Module) -> None:
    """Refuse a configuration that does not fit the model.

    Raises:
        ValueError: names the option, what is allowed, and what the model is.
    """
    layout, sizes = layout_of(model), state_sizes(model)
    model_type = model.config.model_type
    uniform = allocation_of(config, model) == "uniform"
    if not uniform:
        check_per_layer(model)
    if config.skip_layers and (uniform or not set(config.skip_layers) < set(sizes)):
        raise ValueError(
            f"skip_layers = {config.skip_layers}; allowed: some of the layers {sorted(sizes)}, in a model where each "
            "may have a size of its own."
        )
    if config.criterion is not None and not isinstance(layout, SelectiveLayout):
        raise ValueError(
            f"criterion = '{criterion_name(config.criterion)}'; the states of model type '{model_type}' are ranked by "
            "their Hankel singular values: leave it out."
        )
    if config.refit and not isinstance(layout, SelectiveLayout):
        raise ValueError(f"refit = True; a model of type '{model_type}' is balanced instead: leave it out.")
    if config.allocation == "global" and not isinstance(layout, SelectiveLayout):
        raise ValueError(
            f"allocation = 'global'; the layers of model type '{model_type}' are reduced from their weights alone, "
            "without the losses that would compare them: allowed are 'per_layer' and 'uniform'."
        )
    if config.criterion in (taylor, taylor.__name__):
        check_gradients(model)
    if config.recall_pairs:
        check_recall(model, config.recall_pairs)
    config.check_target(reducible_size(config, model))


def reducible_size(config: CompreSSMConfig, model: nn.Module) -> int:
    """The largest N among the layers that may be cut; of a global allocation their mean, as its target is."""
    sizes = [size for index, size in state_sizes(model).items() if index not in config.skip_layers]
    return sum(sizes) // len(sizes) if config.allocation == "global" else max(sizes)


def split_batches(
    model: nn.Module, batches: Iterable[dict] | None, config: CompreSSMConfig
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Batches for statistics, for the judgement of refits, and for losses, on the model's device."""
    selective = isinstance(layout_of(model), SelectiveLayout)
    if batches is None:
        if selective:
            raise ValueError(f"batches = None; a model of type '{model.config.model_type}' is analysed on batches.")
        return [], [], []
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} has no loss to measure: give batches = None, or a model with a head."
        )
    device = next(model.parameters()).device
    taken = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in take_batches(batches, config.calibration_batches, selective, [device])
    ]
    if not selective:
        return [], [], taken
    return (taken[0::3], taken[1::3], taken[2::3]) if config.refit else (taken[0::2], [], taken[1::2])
