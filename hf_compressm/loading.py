"""A language model from a folder or the Hub, in any known format, or one clear error; never weights from nowhere."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME

from .checkpoint import check_checkpoint
from .files import read_json
from .mamba_ssm_format import read_mamba_ssm

LANGUAGE_MODELS = ("mamba", "compressm_mamba")
NEEDED = ["*.json", "*.safetensors", "pytorch_model.bin", "*.txt", "*.model"]  # of a repository: weights and tokenizer


def local_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder `name`, or what the repository of that name on the Hub holds, downloaded.

    Raises:
        FileNotFoundError: neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if str(name).count("/") != 1 or Path(name).exists() or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} is neither a folder nor the name of a repository (user/name).")
    return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=NEEDED))


def load_language_model(folder: str | Path) -> PreTrainedModel:
    """A Mamba with a language modelling head, in eval mode and the dtype it was saved in.

    Args:
        folder: a Transformers checkpoint, uniform or with a size for each layer, or one of the original mamba_ssm.

    Raises:
        FileNotFoundError, ValueError: it is not one, is not complete, or has weights that are not finite.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    if "model_type" not in config and "d_model" in config:
        return read_mamba_ssm(folder).eval()
    check_checkpoint(folder)
    if config["model_type"] not in LANGUAGE_MODELS:
        raise ValueError(
            f"{folder} holds a model of type '{config['model_type']}'; allowed: {', '.join(LANGUAGE_MODELS)}."
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} cannot be loaded ({error}); take another checkpoint.") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ValueError(f"{folder}: {what.replace('_', ' ')} {sorted(report[what])}; take another checkpoint.")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{folder}: {name} holds NaN or Inf; take a checkpoint from before training diverged.")
    return model.eval()
