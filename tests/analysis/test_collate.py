"""What is brought as a batch: rows, lists, arrays and small integers give what tensors give; the rest is one error."""

import logging

import numpy as np
import pytest
import torch
from conftest import build_lru, build_model
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from hf_compressm import CompreSSMConfig, analyze
from hf_compressm.analysis.calibration import take_batches
from hf_compressm.analysis.collate import A_BATCH, as_batch

TARGET = CompreSSMConfig(target_state_size=4)
IDS = torch.arange(1, 13).view(2, 6)
SAME = {
    "tensors": {"input_ids": IDS},
    "int32": {"input_ids": IDS.int()},
    "arrays": {"input_ids": IDS.numpy()},
    "uint16": {"input_ids": IDS.numpy().astype(np.uint16)},
    "a read-only view": {"input_ids": np.broadcast_to(IDS.numpy(), (2, 6))},
    "an array backwards": {"input_ids": IDS.numpy()[:, ::-1].copy()[:, ::-1]},
    "lists": {"input_ids": IDS.tolist()},
    "tuples": {"input_ids": tuple(map(tuple, IDS.tolist()))},
    "a list of arrays": {"input_ids": list(IDS.numpy())},
    "BatchEncoding": BatchEncoding({"input_ids": IDS.tolist()}),
    "a column of a data set": {"input_ids": Dataset.from_dict({"input_ids": IDS.tolist()})["input_ids"]},
}


@pytest.mark.parametrize("kind", SAME)
def test_a_batch_in_another_form_is_the_batch(kind):
    (batch,) = take_batches([{**SAME[kind], "labels": SAME[kind]["input_ids"]}], 1)
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name], IDS) and batch[name].dtype == torch.int64


def test_a_row_is_a_batch_of_one_sequence():
    row = {"text": "seen", "input_ids": [3, 4, 5], "attention_mask": [1, 1, 0], "label": None, "labels": 1}
    batch = as_batch(row, 0)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[3, 4, 5]],
        "attention_mask": [[1, 1, 0]],
        "labels": [1],
    }
    values = as_batch({"input_values": np.ones((5, 2)), "labels": 0}, 0)  # one sequence, two channels
    assert values["input_values"].shape == (1, 5, 2) and values["input_values"].dtype == torch.float32
    assert as_batch({"input_values": np.ones((5, 2)), "labels": [0] * 5}, 0)["input_values"].shape == (5, 2)


def test_other_numbers_are_kept_and_what_holds_none_is_left_out():
    extra = {"targets": IDS.numpy().astype(np.int16), "position_ids": IDS, "weights": [[0.5] * 6] * 2}
    batch = as_batch({"input_ids": IDS, **extra, "text": ["a", "b"], "spans": [[1], [2, 3]], "id": None}, 0)
    assert list(batch) == ["input_ids", "targets", "position_ids", "weights"]
    assert batch["targets"].dtype == torch.int64 and batch["weights"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float64])
def test_a_mask_of_any_type_hides_the_same(batches, dtype):
    mask = torch.ones(8, 32, dtype=torch.int64)
    mask[:, 20:] = 0

    def report(mask):
        return analyze(build_model(), [{"input_ids": b["input_ids"], "attention_mask": mask} for b in batches], TARGET)

    given, expected = report(mask.to(dtype)), report(mask)
    assert (given.loss_before, given.loss_after, given.tokens) == (
        expected.loss_before,
        expected.loss_after,
        expected.tokens,
    )


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_the_rows_of_a_data_set_are_analysed(blocks, form):
    rows = Dataset.from_dict({"text": ["seen"] * 8, "input_ids": blocks[:8].tolist()}).with_format(form)
    expected = analyze(build_model(), [{"input_ids": block[None]} for block in blocks[:8]], TARGET)
    assert analyze(build_model(), rows, TARGET).loss_after == expected.loss_after


def test_a_row_of_values_is_analysed():
    rows = [{"input_values": np.sin(np.arange(20.0) * k), "labels": k % 2} for k in range(4)]
    lru = build_lru(vocab_size=None).eval()
    report = analyze(lru, rows, TARGET)
    together = {"input_values": torch.tensor(np.stack([row["input_values"] for row in rows])).float()}
    loss = lru(**together, labels=torch.tensor([0, 1, 0, 1])).loss.item()
    assert report.loss_before == pytest.approx(loss, rel=1e-5)


DATA = Dataset.from_dict({"input_ids": IDS.tolist() * 4})
REFUSED = {
    "tuples": (DataLoader(TensorDataset(IDS)), "batch 0 is a list: let a collate function make dicts"),
    "tensors": ([IDS] * 4, "batch 0 is a Tensor: let a collate function"),
    "strings": (["some text"] * 4, "batch 0 is text: tokenise it"),
    "rows of text": ([{"text": "some text"}] * 4, "batch 0 has .*'text'.*: tokenise text"),
    "ragged": ([{"input_ids": [[1, 2], [3]]}] * 4, "batch 0 has input_ids .* different lengths: pad them"),
    "words": ([{"input_ids": [["a"], ["b"]]}] * 4, "batch 0 has input_ids .* does not hold numbers"),
    "floats": ([{"input_ids": IDS / 2}] * 4, "input_ids of torch.float32, but ids are whole numbers"),
    "transposed": (DataLoader(DATA, batch_size=2), "list of tensors.*: give the DataLoader collate_fn="),
    "a mask of words": ([{"input_ids": IDS, "attention_mask": "no"}] * 4, "batch 0 has attention_mask"),
    "a number": (5, "batches = 5; allowed: an iterable of batches"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_batch_is_refused_by_an_error_that_says_what_one_is(kind):
    batches, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as refused:
        analyze(build_model(), batches, TARGET)
    assert A_BATCH in str(refused.value)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"input_ids": IDS}, r"a dict of \['input_ids'\]; .* Put a single batch into a list"),
        (DatasetDict(train=DATA), r"a DatasetDict of \['train'\]; .* of a DatasetDict give one split"),
    ],
)
def test_one_batch_alone_and_several_data_sets_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        analyze(build_model(), batches, TARGET)


def test_fewer_batches_are_taken_and_it_is_said_once(batches, caplog):
    config = CompreSSMConfig(target_state_size=4, calibration_batches=7)
    model = build_model()
    with caplog.at_level(logging.WARNING):
        report = analyze(model, batches[:3], config)
        analyze(model, batches[:3], config)
    said = [record.message for record in caplog.records if "calibration data hold 3 batches" in record.message]
    assert len(said) == 1 and "calibration_batches = 7" in said[0]
    three = analyze(model, batches, CompreSSMConfig(target_state_size=4, calibration_batches=3))
    assert (report.loss_before, report.tokens) == (three.loss_before, three.tokens)
    refit = CompreSSMConfig(target_state_size=4, calibration_batches=7, refit=True)
    analyze(model, batches[:3], refit)
    for count, short in ((1, config), (2, refit)):
        with pytest.raises(ValueError, match=f"ended after {count} batches, {count + 1} are needed"):
            analyze(model, batches[:count], short)
