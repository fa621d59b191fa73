"""A model built at its original size adopts the state sizes of the weights that are loaded into it.

A reduced checkpoint loads by itself with `from_pretrained`. Resuming is what needs help: the script builds the model
at its original size, and Trainer copies the smaller weights into it.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..architectures import StateLayers, state_layers
from ..architectures.recorded_sizes import record_state_sizes
from ..engines import Engine, check_replaceable, new_parameter_like, original_class, unwrap
from .checks import state_parameters
from .optimizer_parts import OptimizerParts
from .undo import Undo


def adopt_checkpoint_sizes(model: nn.Module, optimizer=None):
    """Let every layer take the state size of the weights that are loaded into it, just before they are copied.

    This is for `load_state_dict` on a model built at another size, as Trainer does when it resumes. The resized
    tensors are new Parameters: an optimizer is either built afterwards or given here.

    Args:
        model: the model that weights will be loaded into.
        optimizer: the optimizer that was built for the model, if one was, as for `Accelerator.load_state`. It holds
            the new Parameters then, without state, since its own state is about to be loaded, too.

    Returns:
        A handle; its `.remove()` removes the hook.
    """
    state_layers(unwrap(model))
    return unwrap(model).register_load_state_dict_pre_hook(partial(_adopt_sizes, optimizer))


def load_renamed_weights(model: nn.Module, folder: str | Path) -> bool:
    """Load a checkpoint whose file names the weights otherwise than the model does, and return whether it is one.

    Transformers renames, splits or stacks the weights of some architectures, such as Nemotron-H, when it saves and
    loads a model. Trainer does not when it loads, and would leave the model as it is, with no more than a warning.

    Args:
        model: the unwrapped model, which takes the state sizes of the checkpoint.
    """
    if not is_renamed_in_files(model) or not _has_weights(Path(folder)):
        return False
    loaded = original_class(model).from_pretrained(folder)
    model.load_state_dict(loaded.state_dict())
    return True


def is_renamed_in_files(model: nn.Module) -> bool:
    """Return whether files name the weights of a model otherwise than it does itself."""
    return bool(get_checkpoint_conversion_mapping(model.config.model_type))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def _adopt_sizes(optimizer, model: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Resize the layers whose weights in `state_dict` have another size.

    Weights may come in several parts, and those of one layer in different ones.
    """
    layers, sizes = StateLayers(model), {}
    if is_renamed_in_files(model) and not any(prefix + name in state_dict for name, _ in model.named_parameters()):
        raise ValueError(
            f"the weights of this {type(model).__name__} have other names in the file than in the model, and Trainer "
            "does not convert them: call callback.attach(trainer); elsewhere load them with from_pretrained."
        )
    for index, mixer in layers.items():
        for path in layers.family.paths(mixer):
            tensor = layers.family.tensors[path]
            weights = state_dict.get(prefix + layers.parameter_name(index, path))
            if weights is not None:
                size = layers.family.size_at(mixer, path, weights.shape[tensor.axis])
                if size != layers.family.state_size(mixer):
                    sizes[index] = size
    if sizes:
        parts = OptimizerParts(optimizer)
        if optimizer is not None:
            parts.check(state_parameters(layers))
        for name, parameter in state_parameters(layers).items():
            check_replaceable(name, parameter)
        with Undo([Engine(model, trains=False)], [parts]):
            for index, size in sizes.items():
                _resize_empty(layers, index, size, parts)
            record_state_sizes(layers, sizes)


@torch.no_grad()
def _resize_empty(layers: StateLayers, index: int, size: int, parts: OptimizerParts) -> None:
    """Put new Parameters of the right shape in the place of the old; they are about to be overwritten.

    A tensor whose shape stays may have been loaded already, and is left alone.
    """
    for path, old in layers.parameters(index).items():
        shape = list(old.shape)
        shape[layers.family.tensors[path].axis] = layers.family.axis_length(layers[index], path, size)
        if shape == list(old.shape):
            continue
        module, name = layers.place(index, path)
        module._parameters[name] = new = new_parameter_like(old, old.new_zeros(shape))
        parts.swap_parameter(old, new, {})
