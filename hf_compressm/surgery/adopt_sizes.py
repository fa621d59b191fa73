"""A model built at its original size adopts the state sizes of the weights that are loaded into it.

A reduced checkpoint loads by itself with `from_pretrained`. Resuming is what needs help: the script builds the model
at its original size, and Trainer copies the smaller weights into it.
"""

import torch
from torch import nn

from ..architectures import StateLayers, state_layers
from ..architectures.recorded_sizes import record_state_sizes
from ..engines import Engine, check_replaceable, new_parameter_like, unwrap
from .checks import state_parameters
from .undo import Undo


def adopt_checkpoint_sizes(model: nn.Module):
    """Let every layer take the state size of the weights that are loaded into it, just before they are copied.

    This is for `load_state_dict` on a model built at another size, as Trainer does when it resumes. The resized
    tensors are new Parameters, so an optimizer has to be built afterwards.

    Returns:
        A handle; its `.remove()` removes the hook.
    """
    state_layers(unwrap(model))
    return unwrap(model).register_load_state_dict_pre_hook(_adopt_sizes)


def _adopt_sizes(model: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Resize the layers whose weights in `state_dict` have another size.

    Weights may come in several parts, and those of one layer in different ones.
    """
    layers, sizes = StateLayers(model), {}
    for index, mixer in layers.items():
        for path, tensor in layers.family.tensors.items():
            weights = state_dict.get(prefix + layers.parameter_name(index, path))
            if weights is not None:
                size = layers.family.size_at(mixer, path, weights.shape[tensor.axis])
                if size != layers.family.state_size(mixer):
                    sizes[index] = size
    if sizes:
        for name, parameter in state_parameters(layers).items():
            check_replaceable(name, parameter)
        with Undo([Engine(model, trains=False)]):
            for index, size in sizes.items():
                _resize_empty(layers, index, size)
            record_state_sizes(layers, sizes)


@torch.no_grad()
def _resize_empty(layers: StateLayers, index: int, size: int) -> None:
    """Put new Parameters of the right shape in the place of the old; they are about to be overwritten."""
    for path, old in layers.parameters(index).items():
        shape = list(old.shape)
        shape[layers.family.tensors[path].axis] = layers.family.axis_length(layers[index], path, size)
        module, name = layers.place(index, path)
        module._parameters[name] = new_parameter_like(old, old.new_zeros(shape))
