"""A language model is loaded from a folder or the Hub, in any known format; incomplete weights are refused."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..architectures.registry import FAMILIES
from .checkpoint import check_checkpoint, weight_shapes
from .files import read_json
from .mamba_ssm_format import read_mamba_ssm

# Entries of a config by which Transformers takes code, kernels or weights from elsewhere, or other weights than float.
FROM_ELSEWHERE = ("attn_implementation", "_attn_implementation", "quantization_config", "transformers_weights")
TRUST = {"trust_remote_code": False}  # code beside the weights is not run: the classes are our own
# Whatever a tokenizer of Transformers may need: its own files, those of its vocabulary, its code, its chat templates.
TOKENIZER_FILES = (
    "tokenizer* tokenization_*.py special_tokens_map.json added_tokens.json *vocab*.json vocab*.txt merges*.txt "
    "*.model *.tiktoken *.tokenizer bpe.codes dict.txt byte_maps.json emoji.json normalizer.json word_shape.json "
    "word_pronunciation.json chat_template* additional_chat_templates/*"
).split()
NEEDED = ["*.json", "*.safetensors", "pytorch_model.bin", *TOKENIZER_FILES]  # of a repository


def local_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder `name`, or download the repository of that name from the Hub and return its folder.

    Raises:
        FileNotFoundError: `name` is neither a folder nor the name of a repository.
    """
    _check_name(name)
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=NEEDED))


def _check_name(name: str | Path) -> None:
    is_name = str(name).count("/") == 1 and not Path(name).exists() and not str(name).startswith((".", "/", "~"))
    if not (Path(name).is_dir() or is_name):
        raise FileNotFoundError(f"{name} is neither a folder nor the name of a repository (user/name).")


def load_language_model(folder: str | Path) -> PreTrainedModel:
    """Load a model with a language modelling head, in eval mode and in the dtype that it was saved in.

    Args:
        folder: a Transformers checkpoint, uniform or with a size for each layer, or one of the original mamba_ssm.

    Raises:
        FileNotFoundError, ValueError: the folder holds no such model, is not complete, or has weights that are not
            finite.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    if "model_type" not in config and "d_model" in config:
        return read_mamba_ssm(folder).eval()
    check_checkpoint(folder)
    if not FAMILIES[config["model_type"]].is_language_model:
        allowed = ", ".join(model_type for model_type, family in FAMILIES.items() if family.is_language_model)
        raise ValueError(f"{folder} holds a model of type '{config['model_type']}'; allowed: {allowed}.")
    _check_own_weights(folder, config)
    try:
        config = AutoConfig.from_pretrained(folder, **TRUST)
        _check_shapes(folder, config)
        how = {"output_loading_info": True, "ignore_mismatched_sizes": True} | TRUST  # the report is looked at below
        model, report = AutoModelForCausalLM.from_pretrained(folder, config=config, **how)
    except Exception as error:  # of any kind: Transformers takes whatever values are there
        raise ValueError(f"{folder} cannot be loaded ({error}); take another checkpoint.") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ValueError(f"{folder} has {what.replace('_', ' ')} {sorted(report[what])}; take another checkpoint.")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{folder}: {name} holds NaN or Inf; take a checkpoint from before training diverged.")
    return model.eval()


def language_model_without_weights(name: str | Path) -> PreTrainedModel:
    """Make the model that a config describes on the meta device, where it takes no memory.

    Args:
        name: a folder, or a repository on the Hub, of which nothing but the `config.json` is read.

    Raises:
        FileNotFoundError: `name` is neither a folder nor the name of a repository.
        ValueError: there is no such config, or Transformers has no language model for it.
    """
    _check_name(name)
    try:
        config = AutoConfig.from_pretrained(name, **TRUST)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=config.dtype, **TRUST)
    except Exception as error:  # of any kind: Transformers takes whatever values are there
        raise ValueError(f"{name} has no config of a language model of Transformers ({error}).") from error


def _check_own_weights(folder: Path, config: dict) -> None:
    """Refuse a checkpoint to which code or weights from elsewhere belong."""
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(f"{folder} holds an adapter ({ADAPTER_CONFIG_NAME}); merge it into its model first.")
    for name in FROM_ELSEWHERE:
        if config.get(name) is not None:
            raise ValueError(f"{folder / CONFIG_NAME}: {name} = {config[name]!r}; allowed: none. Remove the entry.")


def _check_shapes(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse weights that do not fit the config, before memory is taken for what it asks for."""
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config, **TRUST).state_dict()
    given = weight_shapes(folder)
    for name in sorted(given.keys() & wanted.keys()):
        if given[name] != tuple(wanted[name].shape):
            raise ValueError(f"{name} has the shape {given[name]}, the config asks for {tuple(wanted[name].shape)}")
