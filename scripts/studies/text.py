"""This text is English prose and documentation from Debian packages, 36 MB, and needs no network access to any hub.

Of its bytes 8 % are translations of the documentation. To get it:

    sudo apt-get install anarchism linux-doc-6.1

or, without installing: `apt-get download anarchism linux-doc-6.1`, `dpkg-deb -x` of each into one folder, and
`ENGLISH_TEXT` set to it.
"""

import gzip
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from hf_compressm.analysis.recall import recall_probe
from hf_compressm.storage.files import write_aside

from .tasks import Sequences, answered

ROOT = Path(os.environ.get("ENGLISH_TEXT", "/"))
PACKAGES = {
    "anarchism": "usr/share/doc/anarchism/markdown/*.md.gz",
    "linux-doc-6.1": "usr/share/doc/linux-doc-6.1/html/_sources/**/*.rst.txt*",
}
END_OF_TEXT = "<|endoftext|>"
PAIRS = 4  # to recall, of random tokens


@dataclass(frozen=True)
class EnglishText:
    """The documents, in an order of their own, are tokenised by a BPE trained on them, in blocks of `length` tokens.

    Attributes:
        tokenizer_characters: the number of characters that are read to train the tokenizer.
        validation_sequences: the first blocks, which are not trained on.
    """

    vocab_size: int
    length: int
    validation_sequences: int
    tokenizer_characters: int = 8_000_000
    packages: tuple[str, ...] = tuple(PACKAGES)

    probed = 8  # sequences, where a run is watched closely

    def prepare(self, root: Path) -> None:
        """Write the tokens beside the runs, once.

        Raises:
            FileNotFoundError: a package is not installed; the message says how to get it.
        """
        if self._file(root).exists():
            return
        root.mkdir(parents=True, exist_ok=True)
        texts = list(chain.from_iterable(documents(package) for package in self.packages))
        random.Random(0).shuffle(texts)
        tokenizer = ByteLevelBPETokenizer()
        start = " ".join(texts)[: self.tokenizer_characters]
        tokenizer.train_from_iterator(
            start.splitlines(keepends=True), self.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
        )
        end = tokenizer.token_to_id(END_OF_TEXT)
        parts = [torch.tensor([*encoding.ids, end], dtype=torch.int32) for encoding in tokenizer.encode_batch(texts)]
        tokens = torch.cat(parts)
        blocks = tokens[: len(tokens) // self.length * self.length].view(-1, self.length).contiguous()
        write_aside(self._file(root), partial(save_file, {"blocks": blocks}))

    def training(self, count: int, seed: int, root: Path) -> Sequences:
        """Return `count` sequences, in an order of the seed; the first come again where there are no more."""
        blocks = self._blocks(root)[self.validation_sequences :]
        generator, rounds = torch.Generator().manual_seed(seed), -(-count // len(blocks))
        order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(rounds)])[:count]
        chosen = blocks[order].long()
        return Sequences(chosen, chosen)

    def architecture(self) -> dict:
        """Return what the model has to know of the text."""
        return {"vocab_size": self.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

    def measure(self, root: Path, count: int | None = None) -> Callable[[nn.Module], dict[str, float]]:
        """Return a function for loss and accuracy on validation text, and for the recall of random pairs of tokens.

        Args:
            count: of validation sequences at most.
        """
        validation = self._blocks(root)[: self.validation_sequences][:count].long()

        def measured(model: nn.Module) -> dict[str, float]:
            recall = recall_probe(model, PAIRS)
            told = {"recall_loss": recall.loss, "recall_accuracy": recall.accuracy}
            return answered(model, Sequences(validation, validation), 8) | told

        return measured

    def _file(self, root: Path) -> Path:
        return root / f"tokens_{self.vocab_size}_{self.length}.safetensors"

    def _blocks(self, root: Path) -> torch.Tensor:
        return load_file(self._file(root))["blocks"]


def documents(package: str) -> Iterator[str]:
    """Return the texts of a Debian package, in the order of their names."""
    files = sorted(ROOT.glob(PACKAGES[package]))
    if not files:
        raise FileNotFoundError(
            f"no text of the Debian package {package} under {ROOT}: install it (apt-get install {package}), or set "
            f"ENGLISH_TEXT to a folder into which it was unpacked (apt-get download {package}; dpkg-deb -x)."
        )
    for file in files:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        yield content.decode("utf-8", errors="ignore")
