"""These tasks are sequences on which memory is all that counts; the same seed generates the same sequences."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_compressm.analysis.calibration import undisturbed

IGNORED = -100  # positions without a label
TEST_SEQUENCES, TEST_SEED = 1024, 7


@dataclass
class Sequences(Dataset):
    """They have `input_ids` and `labels`, (sequences, L); as in Transformers logits k are for label k + 1."""

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Yield all of them in order, `size` at a time."""
        return [self[part] for part in torch.arange(len(self)).split(size)]


@torch.no_grad()
def answered(model: nn.Module, data: Sequences, batch_size: int) -> dict[str, float]:
    """Return mean loss (nats) and accuracy at the labelled positions, without disturbing the model."""
    loss, right, asked = 0.0, 0, 0
    with undisturbed(model):
        for batch in data.batches(batch_size):
            labels = batch["labels"][:, 1:].to(model.device)
            logits = model(batch["input_ids"].to(model.device), use_cache=False).logits[:, :-1]
            where = labels != IGNORED
            loss += nn.functional.cross_entropy(logits[where].float(), labels[where], reduction="sum").item()
            right += int((logits[where].argmax(-1) == labels[where]).sum())
            asked += int(where.sum())
    return {"loss": loss / asked, "accuracy": right / asked}


class GeneratedTask:
    """Generated tasks have these methods in common; a task defines `sequences(count, seed)`."""

    probed = 256  # sequences, where a run is watched closely

    def prepare(self, root: Path) -> None:
        """Do nothing, since nothing has to be there before a run."""

    def training(self, count: int, seed: int, root: Path) -> Sequences:
        """Return `count` sequences, none of them twice."""
        return self.sequences(count, 1000 + seed)

    def architecture(self) -> dict:
        """Return what the model has to know of the task."""
        return {"vocab_size": self.vocab_size}

    def measure(self, root: Path, count: int = TEST_SEQUENCES) -> Callable[[nn.Module], dict[str, float]]:
        """Return a function for loss and accuracy on `count` sequences that are the same for all runs."""
        test = self.sequences(count, TEST_SEED)
        return lambda model: answered(model, test, 256)


@dataclass(frozen=True)
class AssociativeRecall(GeneratedTask):
    """The task is multi-query associative recall (Arora et al., arXiv 2312.04927): k₁ v₁ k₂ v₂ …, then keys to answer.

    Keys of a sequence are distinct; at each of the `queries` keys, drawn from them with replacement, the model has to
    predict the value that the key came with. L = 2 · pairs + queries + 1.
    """

    pairs: int
    queries: int
    keys: int
    values: int

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values

    @property
    def difficulty(self) -> str:
        """Return the difficulty in words."""
        return f"{self.pairs} pairs of {self.keys} keys"

    def sequences(self, count: int, seed: int) -> Sequences:
        """Return `count` freshly drawn sequences."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.rand(count, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = self.keys + torch.randint(self.values, (count, self.pairs), generator=generator)
        asked = torch.randint(self.pairs, (count, self.queries), generator=generator)
        told, nothing = torch.stack([keys, values], -1).flatten(1), torch.zeros(count, 1, dtype=torch.long)
        ids = torch.cat([told, keys.gather(1, asked), nothing], 1)
        unasked = torch.full((count, 2 * self.pairs + 1), IGNORED)
        return Sequences(ids, torch.cat([unasked, values.gather(1, asked)], 1))


@dataclass(frozen=True)
class SelectiveCopying(GeneratedTask):
    """The task is to tell symbols that came at random places among blanks (Gu and Dao, arXiv 2312.00752, 4.1.1).

    They are told in order, after a sign. L = length + 1 + told. Token 0 is the blank, 1 the sign.
    """

    told: int
    length: int
    symbols: int

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def difficulty(self) -> str:
        """Return the difficulty in words."""
        return f"{self.told} symbols of {self.symbols} in {self.length}"

    def sequences(self, count: int, seed: int) -> Sequences:
        """Return `count` freshly drawn sequences."""
        generator = torch.Generator().manual_seed(seed)
        symbols = 2 + torch.randint(self.symbols, (count, self.told), generator=generator)
        places = torch.rand(count, self.length, generator=generator).argsort(1)[:, : self.told].sort(1).values
        told = torch.zeros(count, self.length, dtype=torch.long).scatter(1, places, symbols)
        sign, unasked = torch.ones(count, 1, dtype=torch.long), torch.full((count, self.length + 1), IGNORED)
        return Sequences(torch.cat([told, sign, symbols], 1), torch.cat([unasked, symbols], 1))
