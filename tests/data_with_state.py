"""Data sets and collators that keep a state of their own: an iterator, a buffer, a random generator."""

import itertools
import random

import numpy as np
import torch
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import Dataset, IterableDataset
from transformers import default_data_collator


class SharedIterator(IterableDataset):
    """Its `__iter__` goes on where the last stopped."""

    def __init__(self, blocks: torch.Tensor):
        self.rows = iter([{"input_ids": block, "labels": block} for block in blocks])

    def __iter__(self):
        return self.rows


class OneShot(SharedIterator):
    """It is its own iterator."""

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        return next(self.rows)


class Blocks(Dataset):
    """Examples by number, each shifted by what `draw` says."""

    def __init__(self, blocks: torch.Tensor, draw=None):
        self.blocks, self.draw = blocks, draw or (lambda: 0)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> dict:
        block = self.blocks[number].roll(self.draw())
        return {"input_ids": block, "labels": block}


class RandomShift:
    """A number in 0 … 31 from a generator that this object holds, in a slot."""

    __slots__ = ("generator",)

    def __init__(self, generator):
        self.generator = generator

    def __call__(self) -> int:
        if isinstance(self.generator, torch.Generator):
            return int(torch.randint(32, (1,), generator=self.generator))
        draw = getattr(self.generator, "integers", None) or getattr(self.generator, "randint", None)
        return int(draw(0, 31))


class Packing:
    """Collects tokens and gives out as many as make a batch; what is left waits for the next one."""

    def __init__(self):
        self.buffer = []

    def __call__(self, examples: list[dict]) -> dict:
        for number, example in enumerate(examples):
            self.buffer += example["input_ids"].tolist()[: 32 - number]
        used, self.buffer = self.buffer[:64], self.buffer[64:]
        tokens = torch.tensor(used).view(-1, 32)
        return {"input_ids": tokens, "labels": tokens}


class RandomMask:
    """A collator with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, examples: list[dict]) -> dict:
        batch = default_data_collator(examples)
        hidden = torch.rand(batch["labels"].shape, generator=self.generator) < 0.5
        return batch | {"labels": batch["labels"].masked_fill(hidden, -100)}


MODULE_GENERATOR = np.random.default_rng(0)


def collate_by_the_module(examples: list[dict]) -> dict:
    batch = default_data_collator(examples)
    return {name: value.roll(int(MODULE_GENERATOR.integers(32)), 1) for name, value in batch.items()}


def seeded_module():
    MODULE_GENERATOR.bit_generator.state = np.random.default_rng(0).bit_generator.state
    return collate_by_the_module


def collator_with_a_closure():
    generator = random.Random(0)

    def collate(examples: list[dict]) -> dict:
        batch = default_data_collator(examples)
        return {name: value.roll(generator.randrange(32), 1) for name, value in batch.items()}

    return collate


def with_transform(blocks: torch.Tensor) -> HuggingFaceDataset:
    """A data set of Hugging Face whose transform has a generator of its own."""
    shift = RandomShift(random.Random(1))

    def transform(rows: dict) -> dict:
        return {name: [np.roll(row, shift()).tolist() for row in column] for name, column in rows.items()}

    columns = {"input_ids": blocks.tolist(), "labels": blocks.tolist()}
    return HuggingFaceDataset.from_dict(columns).with_transform(transform)


def shifted(build_generator):
    return lambda blocks: Blocks(blocks, RandomShift(build_generator()))


def same_collator():
    return default_data_collator


# name → what builds (data from blocks, a collator), each time anew in the same state
KINDS = {
    "a stream over one iterator": (SharedIterator, same_collator),
    "a stream that is its own iterator": (OneShot, same_collator),
    "a data set with Python's generator": (shifted(lambda: random.Random(1)), same_collator),
    "a data set with NumPy's": (shifted(lambda: np.random.default_rng(1)), same_collator),
    "a data set with NumPy's old one": (shifted(lambda: np.random.RandomState(1)), same_collator),
    "a data set with torch's": (shifted(torch.Generator), same_collator),
    "a data set that counts": (lambda blocks: Blocks(blocks, itertools.count().__next__), same_collator),
    "a transform": (with_transform, same_collator),
    "a packing collator": (Blocks, Packing),
    "a collator with a generator": (Blocks, RandomMask),
    "a generator in the module": (Blocks, seeded_module),
    "a generator in a closure": (Blocks, collator_with_a_closure),
}
