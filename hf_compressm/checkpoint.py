"""Checkpoints of reduced models: a model built at its original size adopts the size of the weights it is given.

With one size for all layers a reduced model is a plain Mamba checkpoint; nothing here is needed to load it. Resuming
is what needs help: the script builds the model at its original size, and Trainer copies the smaller weights into it.
"""

import json
import re
import zipfile
from functools import partial
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .engines import new_parameter_like, unwrap
from .history import History
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

logger = logging.get_logger(__name__)

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


def check_complete(folder: str | Path) -> None:
    """Refuse a Trainer checkpoint that was not written to its end, or was damaged afterwards.

    Trainer writes `trainer_state.json` last. Weights are checked by `check_checkpoint`, where they are safetensors.

    Raises:
        FileNotFoundError, ValueError: names the file that is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {TRAINER_STATE_NAME}: it was not written to its end. Resume from an earlier checkpoint."
        )
    _read_json(folder / TRAINER_STATE_NAME)
    sharded = [path for path in folder.glob(f"{FSDP_MODEL_NAME}_*") if path.is_dir()]
    for part in (path for path in folder.iterdir() if path.is_dir()):  # weights and optimizer, by all processes
        if not (part / ".metadata").is_file():
            raise FileNotFoundError(
                f"{part} has no .metadata: it was not written to its end. Take another checkpoint."
            )
    for file in folder.iterdir():
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            raise ValueError(f"{file} is truncated or damaged; take another checkpoint.")
    if (folder / SAFE_WEIGHTS_NAME).exists() or (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        check_checkpoint(folder)
    elif not sharded and not list(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{folder} has no weights: it is not a complete checkpoint. Take another.")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in Trainer's output folder; a warning names each newer one that is not."""
    checkpoints = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if path.is_dir() and step.isdigit():
            checkpoints[int(step)] = path
    for step in sorted(checkpoints, reverse=True):
        try:
            check_complete(checkpoints[step])
            return str(checkpoints[step])
        except (FileNotFoundError, ValueError) as error:
            logger.warning(f"Passing over an incomplete checkpoint. {error}")
    return None


def recorded_history(trainer_state: dict) -> History | None:
    """The history in the content of a `trainer_state.json`; None where a run without our callback wrote it."""
    for states in trainer_state.get("stateful_callbacks", {}).values():
        for exported in states if isinstance(states, list) else [states]:
            history = exported.get("attributes", {}).get("exported_history")
            if history is not None:
                return History.from_dict(history)
    return None


def history_of_checkpoint(folder: str | Path) -> History | None:
    """The history of a Trainer checkpoint of any engine; None where a run without our callback wrote it."""
    return recorded_history(_read_json(Path(folder) / TRAINER_STATE_NAME))


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); take another checkpoint.") from error


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
