"""Checkpoints of the original `mamba_ssm` package, Mamba-1 and Mamba-2, are read and written here without it.

Such a checkpoint is what `mamba_ssm`'s `MambaLMHeadModel.from_pretrained` reads: `config.json` with the fields of its
`MambaConfig`, and `pytorch_model.bin`, a pickled dict of tensors. What its layers have is in `mamba_ssm_layers.py`.

All that the model's function depends on is carried over. Three things are not: how new weights are drawn
(`initializer_range`, `rescale_prenorm_residual`, `time_step_min`, `dt_min` and their like), which kernels compute the
function (`fused_add_norm`, `use_fast_path`), and token ids, which the format lacks: set them from the tokenizer.
"""

import json
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, WEIGHTS_NAME, logging

from ..architectures import family_of, state_sizes
from ..architectures.registry import FAMILIES
from .files import write_aside
from .mamba_ssm_layers import LAYER_FORMATS, LayerFormat

logger = logging.get_logger(__name__)

# The fields of mamba_ssm's MambaConfig, with their defaults.
FIELDS = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
REQUIRED_FIELDS = ("d_model", "n_layer", "vocab_size")  # a default for one of these would be a guess at the weights
READABLE = {"attn_layer_idx": [], "d_intermediate": 0, "rms_norm": True}  # what Transformers computes with

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIRECTORY = 0x10  # the bit of MS-DOS in the attributes of a record
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def is_written(model_type: str) -> bool:
    """Return whether models of this type can be written, once all of their layers have the same number of states."""
    return any(FAMILIES[model_type] is FAMILIES[layer.config_class.model_type] for layer in LAYER_FORMATS.values())


def write_mamba_ssm(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model so that `mamba_ssm` loads it; the folder is made where it is missing.

    The vocabulary is not padded and every tensor keeps its dtype, so `read_mamba_ssm` gives the same bits back.

    Raises:
        ValueError: the model is no `MambaForCausalLM` and no `Mamba2ForCausalLM`, or has balanced states, layers of
            different sizes, a config that the format cannot express, or weights that are not finite or do not fit the
            config; or the folder holds a checkpoint of Transformers, whose config would be lost. Nothing has been
            written then.
    """
    folder = Path(folder)
    layer = _format_of(model)
    sizes = sorted(set(state_sizes(model).values()))
    if len(sizes) > 1:
        raise ValueError(f"layers have {sizes} states, the format has one number for all; pad first (pad_state).")
    fields = _original_fields(model.config, layer)
    tensors = {name.replace(".embeddings.", ".embedding."): tensor for name, tensor in model.state_dict().items()}
    problem = _first_problem(tensors, model.config, layer)
    if problem is not None:
        raise ValueError(f"the model cannot be written: {problem}. Repair it, or load a whole one, first.")
    if (folder / CONFIG_NAME).is_file() and '"model_type"' in (folder / CONFIG_NAME).read_text(errors="replace"):
        raise ValueError(
            f"{folder} holds a checkpoint of Transformers, which would lose its {CONFIG_NAME}; take another."
        )
    copies = {name: _own_copy(tensor) for name, tensor in tensors.items()}
    if fields["tie_embeddings"]:
        copies[HEAD] = copies[EMBEDDING]  # stored once
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / WEIGHTS_NAME, lambda path: _save(copies, path))
    write_aside(folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(fields, indent=2) + "\n"))


def read_mamba_ssm(folder: str | Path) -> PreTrainedModel:
    """Read a checkpoint of `mamba_ssm`, in evaluation mode, on the CPU, every tensor in the dtype that it has there.

    `mamba_ssm` pads the vocabulary to a multiple; those rows are kept, so that the logits agree, and `vocab_size`
    counts them. It also keeps `A_log` and `D` in float32 beside weights in bf16, and so does this model; mind that
    Transformers' `from_pretrained`, once it is saved, gives all of them one dtype.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, is not of `mamba_ssm`, holds code in its pickle (which is not run), is of a
            model other than a plain Mamba-1 or Mamba-2, or has tensors that do not fit the config; the error names it.
    """
    folder = Path(folder)
    fields, ssm, layer = _read_fields(folder / CONFIG_NAME)
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    if fields["n_layer"] > len(tensors):  # before anything is made of so many layers
        raise ValueError(
            f"{folder / WEIGHTS_NAME} holds {len(tensors)} tensors, {CONFIG_NAME} says n_layer = {fields['n_layer']}; "
            "the files do not belong together, take another checkpoint."
        )
    try:
        config = _transformers_config(fields, layer.to_transformers(ssm, fields["d_model"]), layer)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}, ssm_cfg: {error}; take another checkpoint.") from error
    problem = _first_problem(tensors, config, layer)
    if problem is not None:
        raise ValueError(f"{folder / WEIGHTS_NAME}: {problem}; take another checkpoint.")
    if config.vocab_size != fields["vocab_size"]:
        logger.warning(
            f"{folder} pads its {fields['vocab_size']} tokens to {config.vocab_size} rows. All are kept, so that the "
            f"logits are those of mamba_ssm; ids from {fields['vocab_size']} on belong to no token."
        )
    with torch.device("meta"):  # nothing is drawn: all weights are those of the file
        model = layer.model_class(config)
    weights = {name.replace(".embedding.", ".embeddings."): _own_copy(tensor) for name, tensor in tensors.items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def _format_of(model: PreTrainedModel) -> LayerFormat:
    """Return the format of the layers of a model.

    Raises:
        ValueError: the format has no such model.
    """
    layer = next((each for each in LAYER_FORMATS.values() if isinstance(model, each.model_class)), None)
    if layer is None:
        names = " or ".join(each.model_class.__name__ for each in LAYER_FORMATS.values())
        raise ValueError(
            f"got a {type(model).__name__}, expected a {names}; unwrap it first. The format has no others."
        )
    if "axis" not in family_of(model).bases:
        raise ValueError(
            f"got a {type(model).__name__}, whose layers project B and C onto balanced states; mamba_ssm has no such "
            "layer. Cut the original model with basis='axis' for this format."
        )
    return layer


def _original_fields(config: PreTrainedConfig, layer: LayerFormat) -> dict:
    """Return the content of mamba_ssm's `config.json` for this config."""
    allowed = layer.writable | {"intermediate_size": (config.expand * config.hidden_size,)}
    for name, values in allowed.items():
        if getattr(config, name, values[0]) not in values:  # the config of Mamba-2 has no intermediate_size
            raise ValueError(
                f"mamba_ssm's format cannot express {name} = {getattr(config, name)!r}: mamba_ssm computes with "
                f"{' or '.join(map(repr, values))}. Keep this model in Transformers' format (save_pretrained)."
            )
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": layer.to_original(config),
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,  # divides any vocabulary
        "tie_embeddings": config.tie_word_embeddings,
    }


def _transformers_config(fields: dict, of_layers: dict, layer: LayerFormat) -> PreTrainedConfig:
    multiple = fields["pad_vocab_size_multiple"]
    return layer.config_class(
        vocab_size=-(-fields["vocab_size"] // multiple) * multiple,
        hidden_size=fields["d_model"],
        num_hidden_layers=fields["n_layer"],
        residual_in_fp32=fields["residual_in_fp32"],
        tie_word_embeddings=fields["tie_embeddings"],
        **of_layers,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # the format has none; 0 would be a guess
    )


def _read_fields(path: Path) -> tuple[dict, dict, LayerFormat]:
    """Return all fields of the config and all of its `ssm_cfg`, with defaults where they were left out."""
    given = _read_json(path)
    if "model_type" in given:
        raise ValueError(f"{path} is a config of Transformers, not of mamba_ssm; use from_pretrained.")
    missing = [name for name in REQUIRED_FIELDS if name not in given]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is no config of mamba_ssm; take another checkpoint.")
    fields = _completed_by_defaults(given, FIELDS, str(path), "model")
    name = fields["ssm_cfg"].get("layer", "Mamba1")
    if name not in list(LAYER_FORMATS):  # it may be of any type
        allowed = ", ".join(map(repr, LAYER_FORMATS))
        raise ValueError(f"{path}, ssm_cfg: layer = {name!r}; allowed: {allowed}. Take another checkpoint.")
    layer = LAYER_FORMATS[name]
    ssm = {name: value for name, value in fields["ssm_cfg"].items() if name not in layer.initialiser_fields}
    ssm, defaults = layer.resolve(ssm, fields["d_model"])
    ssm = _completed_by_defaults(ssm, defaults, f"{path}, ssm_cfg", layer.title)
    for name, value in (READABLE | layer.readable).items():
        if (fields | ssm)[name] != value:
            kind = layer.model_class.__name__.removesuffix("ForCausalLM")
            raise ValueError(
                f"{path}: {name} = {(fields | ssm)[name]!r}, but Transformers' {kind} has {value!r} only; take a "
                f"checkpoint of a plain {layer.title}."
            )
    return fields, ssm, layer


def _completed_by_defaults(given: dict, defaults: dict, where: str, what: str) -> dict:
    """Return `given` completed by `defaults`, or refuse names or types that those lack, and numbers too small."""
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"{where}: mamba_ssm does not know {', '.join(unknown)}; its {what} has {', '.join(defaults)}. Take "
            "another checkpoint, or remove what is not mamba_ssm's."
        )
    for name, value in given.items():
        kind = type(defaults[name])
        least = min(1, defaults[name]) if kind is int else None
        if type(value) is not kind or (kind is int and value < least):
            expected = kind.__name__ + (f" of at least {least}" if kind is int else "")
            raise ValueError(f"{where}: {name} = {value!r}, expected {expected}; take another checkpoint.")
    return defaults | given


def _read_json(path: Path) -> dict:
    _check_exists(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated, damaged or not JSON ({error}); take another checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no table of names and values; take another checkpoint.")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, or refuse one that holds anything else; no code in it runs."""
    _check_exists(path)
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                _check_records(archive)
            file.seek(0)
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of any kind: torch unpickles whatever bytes are there
            raise ValueError(
                f"{path} is truncated, damaged or no archive of tensors only ({type(error).__name__}); no code in it "
                "was run. Take another checkpoint, or write the model's state_dict with torch.save of today."
            ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds no plain dict of tensors by name; take model.state_dict() of what it holds.")
    return tensors


def _check_records(archive: zipfile.ZipFile) -> None:
    """Refuse what torch would pass over: it takes a flipped bit for a weight, and reads no data from a directory."""
    if archive.testzip() is not None or any(record.external_attr & DIRECTORY for record in archive.infolist()):
        raise ValueError("a record is damaged")


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Give a local folder with {CONFIG_NAME} and {WEIGHTS_NAME} as mamba_ssm writes them "
            "(for a model on the Hub: huggingface_hub.snapshot_download)."
        )


def _first_problem(tensors: dict[str, Tensor], config: PreTrainedConfig, layer: LayerFormat) -> str | None:
    """Say why tensors, by mamba_ssm's names, cannot be the weights of a model of this config; None if they can."""
    shapes = _shapes(config, layer)
    if missing := sorted(shapes.keys() - tensors.keys()):
        return f"{len(missing)} tensors that the config asks for are missing, {missing[0]} among them"
    if unknown := sorted(map(str, tensors.keys() - shapes.keys())):
        return f"{len(unknown)} tensors have no place in the config's model, {unknown[0]} among them"
    for name, shape in shapes.items():
        tensor = tensors[name]
        if type(tensor.detach()) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
            return f"{name} is no plain dense tensor ({type(tensor).__name__}, {tensor.layout}, {tensor.device})"
        if tuple(tensor.shape) != shape:
            return f"{name} has the shape {tuple(tensor.shape)}, the config asks for {shape}"
        if tensor.dtype not in DTYPES:
            return f"{name} is of {tensor.dtype}, expected {', '.join(map(str, DTYPES))}"
        if not tensor.isfinite().all():
            return f"{name} holds NaN or infinity: the model diverged"
    # mamba_ssm computes with A_log and D in float32 whatever the others are.
    dtypes = {str(tensor.dtype) for name, tensor in tensors.items() if not name.endswith((".A_log", ".D"))}
    if len(dtypes) > 1:
        return f"weights are of {', '.join(sorted(dtypes))}, expected one dtype (model.to) except for A_log and D"
    if config.tie_word_embeddings and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        return f"{HEAD} differs from {EMBEDDING}, but the config ties the embeddings"
    return None


def _shapes(config: PreTrainedConfig, layer: LayerFormat) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model of this config, by mamba_ssm's names."""
    hidden = config.hidden_size
    of_layer = {"norm.weight": (hidden,)} | {f"mixer.{name}": shape for name, shape in layer.shapes(config).items()}
    shapes = {EMBEDDING: (config.vocab_size, hidden), "backbone.norm_f.weight": (hidden,)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"backbone.layers.{index}.{name}": shape for name, shape in of_layer.items()}
    return shapes | {HEAD: (config.vocab_size, hidden)}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch writes its name, here a temporary one, into the archive
        torch.save(tensors, file)


def _own_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, where it shares its storage with no other and has no more of it than it needs."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
