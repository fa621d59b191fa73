"""An export writes a language model in the form that another tool wants, and keeps it only if its logits agree."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..architectures import state_sizes
from ..architectures.installed_scan import scan_installed
from ..surgery.shrink_and_grow import pad_state
from .files import check_new, folder_aside
from .history import HISTORY_FILE, SPECTRA_FILE
from .loading import TOKENIZER_FILES, load_language_model
from .mamba_ssm_format import write_mamba_ssm

TOLERANCE = 1e-5  # the largest difference of logits that is allowed, as a share of the largest logit
PROBE = (2, 64)  # how many sequences of how many tokens the logits are compared on
CARRIED = (*TOKENIZER_FILES, GENERATION_CONFIG_NAME)
HISTORY = (HISTORY_FILE, SPECTRA_FILE)


@dataclass(frozen=True)
class Exported:
    """This record says what an export has written.

    Attributes:
        folder: the folder of the written model.
        state_sizes: N by layer index.
        difference: largest difference of the logits from those of the source, computed in float32.
        largest_logit: largest logit of the source, to compare the difference with.
    """

    folder: Path
    state_sizes: dict[int, int]
    difference: float
    largest_logit: float

    def __str__(self) -> str:
        sizes = sorted(set(self.state_sizes.values()))
        return (
            f"{self.folder}: N = {', '.join(map(str, sizes))}; logits differ from the source's by at most "
            f"{self.difference:.1e} (largest logit {self.largest_logit:.1f})"
        )


def export_uniform(source: Path, target: Path, state_size: int | None = None) -> Exported:
    """Write a model with one state size for all layers, by default that of the largest; added states do nothing."""

    def write(model: PreTrainedModel, folder: Path) -> None:
        pad_state(model, max(state_sizes(model).values()) if state_size is None else state_size)
        in_one_dtype(model).save_pretrained(folder)

    return _export(source, target, write)


def export_bf16(source: Path, target: Path) -> Exported:
    """Write all weights in bfloat16, at half the size: for use, and not for further training."""

    def write(model: PreTrainedModel, folder: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(folder)

    return _export(source, target, write, rounded_to=torch.bfloat16)


def export_sharded(source: Path, target: Path, max_shard_size: str = "5GB") -> Exported:
    """Write safetensors files of at most `max_shard_size` each, with an index.

    Raises:
        ValueError: `max_shard_size` is no size, or the model fits into one file.
    """

    def write(model: PreTrainedModel, folder: Path) -> None:
        try:
            in_one_dtype(model).save_pretrained(folder, max_shard_size=max_shard_size)
        except ValueError as error:
            raise ValueError(f"max_shard_size = {max_shard_size}; allowed: a size such as 5GB ({error}).") from error
        if not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
            raise ValueError(f"max_shard_size = {max_shard_size}; the model fits into one file: give less.")

    return _export(source, target, write)


def export_mamba_ssm(source: Path, target: Path) -> Exported:
    """Write what `MambaLMHeadModel.from_pretrained` of mamba_ssm reads, with one size for all layers.

    Every weight keeps its dtype, since that format has one for each.
    """

    def write(model: PreTrainedModel, folder: Path) -> None:
        pad_state(model, max(state_sizes(model).values()))
        write_mamba_ssm(model, folder)

    return _export(source, target, write, carried=CARRIED)


def _export(
    source: Path,
    target: Path,
    write: Callable[[PreTrainedModel, Path], None],
    rounded_to: torch.dtype | None = None,
    carried: tuple[str, ...] = CARRIED + HISTORY,
) -> Exported:
    """Write an export aside, read it back as a user would, compare the logits, and only then rename it.

    Raises:
        ValueError, FileExistsError: the export is impossible or came out wrong; nothing is left of it.
    """
    source, target = Path(source), Path(target)
    check_new(target)
    model = load_language_model(source)
    expected = _logits(model)
    rounded = expected if rounded_to is None else _logits(model.to(rounded_to))
    with folder_aside(target) as folder:
        write(model, folder)
        _carry_over(source, folder, carried)
        written = load_language_model(folder)
        found, largest = _logits(written), float(expected.abs().max())
        if not float((found - rounded).abs().max()) <= TOLERANCE * max(largest, 1.0):
            raise ValueError(
                f"the export of {source} gives other logits than its source, by {(found - rounded).abs().max():.1e}; "
                "it was not kept. Please report this."
            )
    return Exported(target, state_sizes(written), float((found - expected).abs().max()), largest)


def in_one_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """Cast all weights to the widest of their dtypes, which loses nothing, and return the model.

    Transformers reads every weight in the one dtype that `config.json` names: what is saved in several dtypes would
    come back as another model.
    """
    return model.to(reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()}))


def _carry_over(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of these patterns, in the folders where they lie, but for those that were written anew."""
    for file in {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}:
        target = folder / file.relative_to(source)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Compute the logits of fixed tokens by a copy of the model in float32, (2, 64, vocabulary)."""
    tokens = torch.randint(model.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    with scan_installed():
        return copy.deepcopy(model).float()(input_ids=tokens, use_cache=False).logits
