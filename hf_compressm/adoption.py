"""A model built at its original size adopts the state size of the weights that are loaded into it.

With one size for all layers a reduced model is a plain Mamba checkpoint; nothing here is needed to load it. Resuming
is what needs help: the script builds the model at its original size, and Trainer copies the smaller weights into it.
"""

from functools import partial

import torch
from torch import nn

from .engines import new_parameter_like, unwrap
from .layouts import (
    StateLayout,
    axis_length,
    layout_of,
    record_state_size,
    state_layers,
    state_size,
    state_size_of,
)


def adopt_checkpoint_sizes(model: nn.Module) -> list:
    """Let every mixer take the state size of the weights that are loaded into it, just before they are copied.

    For `load_state_dict` on a model built at another size, as Trainer does when it resumes. The resized tensors are
    new Parameters, so an optimizer has to be built afterwards.

    Returns:
        Handles; call `.remove()` on each to stop.
    """
    layout = layout_of(unwrap(model))
    hook = partial(_adopt_size, layout=layout)
    return [mixer.register_load_state_dict_pre_hook(hook) for mixer in state_layers(unwrap(model)).values()]


def _adopt_size(mixer: nn.Module, state_dict: dict, prefix: str, *args, layout: StateLayout) -> None:
    """Take N from any of the mixer's tensors: those of one layer may lie in different shards."""
    for path, tensor in layout.tensors.items():
        weights = state_dict.get(prefix + path)
        if weights is not None:
            size = state_size_of(weights.shape[tensor.axis], mixer, layout, tensor)
            if size != state_size(mixer, layout):
                _resize_empty(mixer, layout, size)
            return


@torch.no_grad()
def _resize_empty(mixer: nn.Module, layout: StateLayout, size: int) -> None:
    """New Parameters of the right shape, about to be overwritten."""
    for path, tensor in layout.tensors.items():
        old = mixer.get_parameter(path)
        shape = list(old.shape)
        shape[tensor.axis] = axis_length(mixer, layout, tensor, size)
        module_path, _, name = path.rpartition(".")
        mixer.get_submodule(module_path)._parameters[name] = new_parameter_like(old, old.new_zeros(shape))
    record_state_size(mixer, layout, size)
