"""Draws from training data leave the state of the data and of their collator as it was, and do not depend on it."""

import copy
import random
from itertools import islice

import numpy as np
import pyarrow
import pytest
import torch
from data_with_state import KINDS, Blocks, Packing
from torch import nn
from transformers import default_data_collator

from hf_compressm.analysis.drawing import TrainingData, draw_batches
from hf_compressm.analysis.own_state import LARGE, LONG, OwnGenerators, copy_of


def read(dataset, collate, count: int = 4) -> list[torch.Tensor]:
    """Batches as a training would read them, one example after the other."""
    examples = islice(iter(dataset), 8 * count)
    batches = [collate(list(islice(examples, 8))) for _ in range(count)]
    return [torch.as_tensor(batch["labels"]).clone() for batch in batches]


def tensors_of(batches) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch in batches]


def are_equal(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_reads_is_the_same_after_a_draw(blocks, kind):
    build_data, build_collator = KINDS[kind]
    untouched = read(build_data(blocks), build_collator())
    dataset, collate = build_data(blocks), build_collator()
    data = TrainingData(dataset, collate, 8)
    data.draw(2, seed=0, step=0)
    data.draw(2, seed=0, step=5)
    assert are_equal(read(dataset, collate), untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_the_same_after_training_has_read(blocks, kind):
    build_data, build_collator = KINDS[kind]
    dataset, collate = build_data(blocks), build_collator()
    data = TrainingData(dataset, collate, 8)
    first = tensors_of(data.draw(2, seed=0, step=5))
    read(dataset, collate)
    assert are_equal(tensors_of(data.draw(2, seed=0, step=5)), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_that_of_draw_batches_from_untouched_data(blocks, kind):
    build_data, build_collator = KINDS[kind]
    expected = draw_batches(build_data(blocks), build_collator(), 8, 2, 0, 5)
    drawn = TrainingData(build_data(blocks), build_collator(), 8).draw(2, seed=0, step=5)
    assert are_equal(tensors_of(drawn), tensors_of(expected))


def test_examples_that_are_batches_are_drawn_one_by_one(blocks):
    batches = [{"input_ids": part} for part in blocks[:64].split(8)]
    by_number = draw_batches(batches, lambda batch: batch, None, 8, 0, 0)
    drawn = [
        next(i for i, batch in enumerate(batches) if batch["input_ids"] is each["input_ids"]) for each in by_number
    ]
    assert sorted(drawn) == list(range(8)) != drawn
    first = draw_batches(iter(batches), lambda batch: batch, None, 3, 0, 0, process=1, processes=2)
    assert are_equal(tensors_of(first), [batch["input_ids"] for batch in batches[1:6:2]])


class Holder:
    """Data of every kind, and a state."""

    def __init__(self):
        self.tensor, self.array = torch.zeros(LARGE), np.zeros(LARGE)
        self.table = pyarrow.table({"a": [1]})
        self.rows, self.model = list(range(LONG + 1)), nn.Linear(2, 2)
        self.buffer, self.generator = [1, 2], random.Random(0)
        self.iterator = iter(self.rows)


def test_a_copy_has_its_own_state_and_the_same_data():
    holder = Holder()
    copied = copy_of(holder)
    for name in ("tensor", "array", "table", "rows", "model"):
        assert getattr(copied, name) is getattr(holder, name)
    assert copied.buffer is not holder.buffer and copied.generator.random() == holder.generator.random()
    assert [next(copied.iterator), next(copied.iterator), next(holder.iterator)] == [0, 1, 0]


def test_a_file_of_tokens_is_not_read_to_copy_a_stream(tmp_path):
    holder = Holder()
    holder.array = np.memmap(tmp_path / "tokens.bin", np.uint16, "w+", shape=(LARGE,))
    assert copy_of(holder).array is holder.array
    assert copy.deepcopy(holder).array is not holder.array


def test_what_cannot_be_copied_stays_what_it_is(tmp_path):
    with open(tmp_path / "file", "w") as file:
        holder = Packing()
        holder.file = file
        assert copy_of(holder) is holder


def test_generators_of_a_loader_come_back_whatever_reads_from_it(blocks):
    generator = torch.Generator().manual_seed(1)
    options = {"batch_size": 8, "shuffle": True, "collate_fn": default_data_collator}
    loader = torch.utils.data.DataLoader(Blocks(blocks), generator=generator, **options)
    own, before = OwnGenerators(loader), generator.get_state()
    with own.rewound():
        first = next(iter(loader))["input_ids"]
    assert torch.equal(generator.get_state(), before)
    torch.rand(3, generator=generator)
    moved = generator.get_state()
    with own.rewound():
        assert torch.equal(next(iter(loader))["input_ids"], first)
    assert torch.equal(generator.get_state(), moved) and not torch.equal(moved, before)
