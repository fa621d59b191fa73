"""Checkpoints of reduced models: a model built at its original size adopts the size of the weights it is given.

With one size for all layers a reduced model is a plain Mamba checkpoint; nothing here is needed to load it. Resuming
is what needs help: the script builds the model at its original size, and Trainer copies the smaller weights into it.
"""

import json
import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .engines import unwrap
from .layouts import (
    LAYOUTS,
    StateLayout,
    axis_length,
    config_sizes,
    layout_of,
    record_state_size,
    state_layers,
    state_size,
    state_size_of,
)
from .surgery import assign_parameter, new_parameter_like

_LAYER = re.compile(r"layers\.(\d+)\.")  # the layer in a parameter's name


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


def check_checkpoint(folder: str | Path) -> list[int]:
    """Read the headers of a checkpoint and refuse what could not be loaded right.

    Returns:
        The state size of each layer.

    Raises:
        FileNotFoundError: no config or no safetensors weights in the folder.
        ValueError: another architecture, a truncated or damaged file, or sizes that do not match the config.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG_NAME)
    layout = LAYOUTS.get(config.get("model_type"))
    if layout is None:
        raise ValueError(
            f"{folder} holds a model of type '{config.get('model_type')}'; supported: {', '.join(LAYOUTS)}. Give the "
            "folder of a checkpoint of such a model."
        )
    if layout.size_field not in config or "num_hidden_layers" not in config:
        raise ValueError(f"{folder / CONFIG_NAME} lacks {layout.size_field} or num_hidden_layers; take another.")
    expected = config_sizes(config[layout.size_field], config["num_hidden_layers"])
    sizes = {
        int(_LAYER.search(name)[1]): shape[layout.tensors[layout.marker].axis]
        for name, shape in _weight_shapes(folder).items()
        if name.endswith("." + layout.marker)
    }
    if sorted(sizes) != list(range(config["num_hidden_layers"])) or len(expected) != len(sizes):
        raise ValueError(
            f"the weights in {folder} hold {layout.marker} of the layers {sorted(sizes)}, {CONFIG_NAME} speaks of "
            f"{config['num_hidden_layers']} with {len(expected)} sizes; the checkpoint is incomplete, take another."
        )
    for index, size in sizes.items():
        if size != expected[index]:
            raise ValueError(
                f"{folder}: layer {index} has {size} states, {CONFIG_NAME} says {layout.size_field} = "
                f"{expected[index]}; the files do not belong together, take another checkpoint."
            )
    return expected


def _weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, from the headers of the safetensors files."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else [SAFE_WEIGHTS_NAME]
    shapes = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: it is not a complete checkpoint.")
        try:
            with safe_open(folder / file, "pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is truncated or damaged ({error}); take another checkpoint.") from error
    return shapes


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); take another checkpoint.") from error


@torch.no_grad()
def _resize_empty(mixer: nn.Module, layout: StateLayout, size: int) -> None:
    """New Parameters of the right shape, about to be overwritten."""
    for path, tensor in layout.tensors.items():
        old = mixer.get_parameter(path)
        shape = list(old.shape)
        shape[tensor.axis] = axis_length(mixer, layout, tensor, size)
        assign_parameter(mixer, path, new_parameter_like(old, old.new_zeros(shape)))
    record_state_size(mixer, layout, size)
