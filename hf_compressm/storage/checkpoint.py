"""A checkpoint on disk is checked here: it has to be whole, and its files have to fit each other."""

import re
import zipfile
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..architectures.family import Family
from ..architectures.recorded_sizes import recorded_state_sizes
from ..architectures.registry import FAMILIES, family_of
from .files import read_json
from .history import History

logger = logging.get_logger(__name__)

# What Trainer writes with torch.save, by patterns; other files in a checkpoint are not checked.
WRITTEN_BY_TORCH = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", f"{FSDP_MODEL_NAME}*.bin")
DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; other types would be cast silently
_LAYER = re.compile(r"layers\.(\d+)\.")  # the layer in a parameter's name


def check_checkpoint(folder: str | Path) -> dict[int, int]:
    """Read the headers of a checkpoint and refuse what could not be loaded right.

    Returns:
        The state size of each layer that has a state, by layer index.

    Raises:
        FileNotFoundError: there is no config or there are no safetensors weights in the folder.
        ValueError: the model is of another architecture, a file is truncated or damaged, or the weights have other
            sizes than the config says.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    if config.get("model_type") not in list(FAMILIES):  # it may be of any type
        raise ValueError(
            f"{folder} holds a model of type '{config.get('model_type')}'; supported: {', '.join(FAMILIES)}. Give the "
            "folder of a checkpoint of such a model."
        )
    try:
        expected = recorded_state_sizes(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME} is damaged: {error}; take another checkpoint.") from error
    family = FAMILIES[config["model_type"]]
    found = state_tensor_shapes(folder, family)
    if found.keys() != expected.keys():
        raise ValueError(
            f"the weights in {folder} hold states of the layers {list(found)}, by {CONFIG_NAME} the layers "
            f"{list(expected)} have a state; the checkpoint is incomplete, take another."
        )
    for index in found:
        size = _size_of_layer(folder, family, index, found, config)
        if size != expected[index]:
            raise ValueError(
                f"{folder}: layer {index} has {size} states, {CONFIG_NAME} says {family.size_field} = "
                f"{expected[index]}; the files do not belong together, take another checkpoint."
            )
    return expected


def check_is_of(folder: str | Path, model: nn.Module) -> None:
    """Refuse to resume a training of this model from a checkpoint of another family.

    Raises:
        ValueError: the checkpoint's config names a model type of another family.
    """
    file = Path(folder) / CONFIG_NAME
    given = read_json(file).get("model_type") if file.is_file() else None  # sharded checkpoints have no config
    if given is not None and FAMILIES.get(given) is not family_of(model):
        raise ValueError(
            f"{folder} holds a model of type '{given}', from which a run of one of type '{model.config.model_type}' "
            "cannot go on: give the basis that its run had. Or start anew from its weights, by from_pretrained(…) and "
            "without resume_from_checkpoint."
        )


def check_complete(folder: str | Path) -> None:
    """Refuse a Trainer checkpoint that was not written to its end, or whose files were cut short or damaged.

    Trainer writes `trainer_state.json` last. Of safetensors the headers are read (`check_checkpoint`), of torch's own
    files all checksums; sharded weights are known by their index only.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; the error names it.
    """
    folder = Path(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {TRAINER_STATE_NAME}: it was not written to its end. Resume from an earlier checkpoint."
        )
    if "global_step" not in read_json(folder / TRAINER_STATE_NAME):
        raise ValueError(f"{folder / TRAINER_STATE_NAME} is not a state of Trainer; take another checkpoint.")
    sharded = [path for path in folder.glob(f"{FSDP_MODEL_NAME}_*") if path.is_dir()]
    for part in [*sharded, *(path for path in folder.glob(f"{OPTIMIZER_NAME}_*") if path.is_dir())]:
        if not (part / ".metadata").is_file():
            raise FileNotFoundError(
                f"{part} has no .metadata: it was not written to its end. Take another checkpoint."
            )
    for file in (path for pattern in WRITTEN_BY_TORCH for path in folder.glob(pattern)):
        if not _is_whole(file):
            raise ValueError(f"{file} is truncated or damaged; take another checkpoint.")
    if (folder / "scheduler.pt").exists() and not list(folder.glob(f"{OPTIMIZER_NAME}*")):
        raise FileNotFoundError(f"{folder} has no state of the optimizer, which would start afresh. Take another.")
    if (folder / SAFE_WEIGHTS_NAME).exists() or (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        check_checkpoint(folder)
    elif not sharded and not list(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{folder} has no weights: it is not a complete checkpoint. Take another.")


def _is_whole(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest whole checkpoint in Trainer's output folder, and warn of each newer one that is not whole."""
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
    """Return the history in the content of a `trainer_state.json`; None where a run without our callback wrote it."""
    for states in trainer_state.get("stateful_callbacks", {}).values():
        for exported in states if isinstance(states, list) else [states]:
            history = exported.get("attributes", {}).get("exported_history")
            if history is not None:
                return History.from_dict(history)
    return None


def history_of_checkpoint(folder: str | Path) -> History | None:
    """Return the history of a Trainer checkpoint of any engine; None where a run without our callback wrote it."""
    return recorded_history(read_json(Path(folder) / TRAINER_STATE_NAME))


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of every tensor, by name, from the headers of the safetensors files that Transformers would read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds what is not a weight, or holds a tensor that another one has, too.
    """
    index, shapes = folder / SAFE_WEIGHTS_INDEX_NAME, {}
    is_sharded = index.exists() and not (folder / SAFE_WEIGHTS_NAME).is_file()  # one file goes before an index
    for file in sorted(set(_weight_map(index).values())) if is_sharded else [SAFE_WEIGHTS_NAME]:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: it is not a complete checkpoint.")
        found = _shapes_in_header(folder / file)
        if shapes.keys() & found.keys():
            raise ValueError(f"{folder / file} holds {min(shapes.keys() & found.keys())}, as another file does.")
        shapes |= found
    return shapes


def _shapes_in_header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); take another checkpoint.") from error
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is of {dtype}, expected {', '.join(DTYPES)}; take another checkpoint.")
    return shapes


def state_tensor_shapes(folder: Path, family: Family) -> dict[int, dict[str, tuple[int, ...]]]:
    """Return the shapes of the state tensors in a checkpoint's weights, by layer index and path.

    Raises:
        ValueError: a tensor is not a layer's, has too few axes, or is there twice, as in no model of the family.
    """
    found = {}
    for name, shape in weight_shapes(folder).items():
        path = next((path for path in family.tensors if name.endswith(f".{path}")), None)
        if path is not None:
            layer = _LAYER.search(name)
            if layer is None or len(shape) <= family.tensors[path].axis:
                raise ValueError(f"{folder}: {name} of shape {shape} is not a layer's; take another checkpoint.")
            if found.setdefault(int(layer[1]), {}).setdefault(path, shape) is not shape:
                raise ValueError(f"{folder}: {name} is the second {path} of its layer; take another checkpoint.")
    return dict(sorted(found.items()))


def _size_of_layer(
    folder: Path, family: Family, index: int, found: dict[int, dict[str, tuple[int, ...]]], config: dict
) -> int:
    """Return N of a layer, as its weights have it."""
    shapes, of_others = found[index], {path for shapes in found.values() for path in shapes}
    needed = {path for path, tensor in family.tensors.items() if not tensor.is_optional or path in of_others}
    if missing := needed - shapes.keys():
        raise ValueError(f"{folder}: layer {index} has no {min(missing)}; take another checkpoint.")
    try:
        return family.size_in_weights(shapes, config)
    except ValueError as error:
        raise ValueError(f"{folder}: layer {index}: {error} Take another checkpoint.") from error


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map: it is damaged; take another checkpoint.")
    for file in weight_map.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{index} names the file {file!r}, outside of its folder; do not use it.")
    return weight_map
