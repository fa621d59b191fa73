"""A model built at its original size adopts the state sizes of the weights that are loaded into it.

A reduced checkpoint loads by itself with `from_pretrained`. Resuming is what needs help: the script builds the model
at its original size, and Trainer copies the smaller weights into it.
"""

import torch
from torch import nn

from ..architectures.family import axis_length, layout_of, mixers_of, state_layers, state_size, state_size_of
from ..architectures.state_sizes import record_state_sizes
from ..engines import new_parameter_like, unwrap


def adopt_checkpoint_sizes(model: nn.Module):
    """Let every layer take the state size of the weights that are loaded into it, just before they are copied.

    For `load_state_dict` on a model built at another size, as Trainer does when it resumes. The resized tensors are
    new Parameters, so an optimizer has to be built afterwards.

    Returns:
        A handle; call `.remove()` on it to stop.
    """
    state_layers(unwrap(model))
    return unwrap(model).register_load_state_dict_pre_hook(_adopt_sizes)


def _adopt_sizes(model: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Weights may come in several parts, and those of one layer in different ones."""
    layout, sizes = layout_of(model), {}
    paths = {module: path for path, module in model.named_modules()}
    for index, mixer in mixers_of(model).items():
        for path, tensor in layout.tensors.items():
            weights = state_dict.get(f"{prefix}{paths[mixer]}.{path}")
            if weights is not None:
                size = state_size_of(weights.shape[tensor.axis], mixer, layout, tensor)
                if size != state_size(mixer, layout):
                    sizes[index] = size
    for index, size in sizes.items():
        _resize_empty(mixers_of(model)[index], layout, size)
    if sizes:
        record_state_sizes(model, sizes)


@torch.no_grad()
def _resize_empty(mixer: nn.Module, layout, size: int) -> None:
    """New Parameters of the right shape, about to be overwritten."""
    for path, tensor in layout.tensors.items():
        old = mixer.get_parameter(path)
        shape = list(old.shape)
        shape[tensor.axis] = axis_length(mixer, layout, tensor, size)
        module_path, _, name = path.rpartition(".")
        mixer.get_submodule(module_path)._parameters[name] = new_parameter_like(old, old.new_zeros(shape))
