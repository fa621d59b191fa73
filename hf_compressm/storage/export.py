"""A language model in the form that another tool wants. Nothing is called done before its logits were compared."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..architectures import state_sizes
from ..architectures.mamba_scan import scan_installed
from ..surgery.shrink_and_grow import pad_state
from .files import check_new, folder_aside
from .history import HISTORY_FILE, SPECTRA_FILE
from .loading import load_language_model
from .mamba_ssm_format import write_mamba_ssm

TOLERANCE = 1e-5  # of the largest logit
PROBE = (2, 64)  # sequences, tokens
CARRIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "generation_config.json")
HISTORY = (HISTORY_FILE, SPECTRA_FILE)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        state_sizes: N by layer index.
        difference: largest difference of the logits from those of the source, computed in float32.
        largest_logit: of the source, to measure the difference by.
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
    """One state size for all layers, by states that do nothing; the largest layer's by default."""

    def write(model: PreTrainedModel, folder: Path) -> None:
        pad_state(model, max(state_sizes(model).values()) if state_size is None else state_size)
        model.save_pretrained(folder)

    return _export(source, target, write)


def export_bf16(source: Path, target: Path) -> Exported:
    """Weights in bfloat16: half the size, for use and not for further training."""

    def write(model: PreTrainedModel, folder: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(folder)

    return _export(source, target, write, rounded_to=torch.bfloat16)


def export_sharded(source: Path, target: Path, max_shard_size: str = "5GB") -> Exported:
    """Safetensors files of at most `max_shard_size` each, with an index.

    Raises:
        ValueError: the model fits into one.
    """

    def write(model: PreTrainedModel, folder: Path) -> None:
        try:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        except ValueError as error:
            raise ValueError(f"max_shard_size = {max_shard_size}; allowed: a size such as 5GB ({error}).") from error
        if not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
            raise ValueError(f"max_shard_size = {max_shard_size}; the model fits into one file: give less.")

    return _export(source, target, write)


def export_mamba_ssm(source: Path, target: Path) -> Exported:
    """config.json and pytorch_model.bin as `MambaLMHeadModel.from_pretrained` reads them; one size for all layers."""

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
    """Write aside, read back as a user would, compare, and only then rename.

    Raises:
        ValueError, FileExistsError: nothing was written then.
    """
    source, target = Path(source), Path(target)
    check_new(target)
    model = load_language_model(source)
    expected = _logits(model)
    rounded = expected if rounded_to is None else _logits(model.to(rounded_to))
    with folder_aside(target) as folder:
        write(model, folder)
        for file in {file for pattern in carried for file in source.glob(pattern)}:
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
        written = load_language_model(folder)
        found, largest = _logits(written), float(expected.abs().max())
        if not float((found - rounded).abs().max()) <= TOLERANCE * max(largest, 1.0):
            raise ValueError(
                f"the export of {source} gives other logits than its source, by {(found - rounded).abs().max():.1e}; "
                "it was not kept. Please report this."
            )
    return Exported(target, state_sizes(written), float((found - expected).abs().max()), largest)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Of fixed tokens, in float32, (2, 64, vocabulary); the model keeps its dtype."""
    tokens = torch.randint(model.config.vocab_size, PROBE, generator=torch.Generator().manual_seed(0))
    dtype = next(model.parameters()).dtype
    with scan_installed():
        logits = model.float()(input_ids=tokens, use_cache=False).logits
    model.to(dtype)
    return logits
