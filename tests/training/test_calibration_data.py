"""Where calibration batches come from: the training data, a stream read once in advance, or a loader of one's own."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments, default_data_collator

from hf_compressm import CompreSSMConfig
from hf_compressm.training.calibration_data import CalibrationData

CONFIG = CompreSSMConfig(target_state_size=4, calibration_batches=2, calibration_seed=3)
EXAMPLES = [{"input_ids": [number] * 4, "labels": [number] * 4} for number in range(100)]


class Stream(IterableDataset):
    """Counts how often it is begun, or a copy of it."""

    readings = 0

    def __iter__(self):
        Stream.readings += 1
        return iter(EXAMPLES)


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)


def loader_of(data) -> DataLoader:
    return DataLoader(data, batch_size=4, collate_fn=default_data_collator)


def numbers_of(batches) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def test_every_step_has_a_draw_of_its_own_and_always_the_same(args):
    data = CalibrationData(CONFIG, args, loader_of(EXAMPLES))
    first, second = numbers_of(data.draw(5)), numbers_of(data.draw(10))
    assert first != second
    assert numbers_of(data.draw(5)) == first
    assert numbers_of(CalibrationData(CONFIG, args, loader_of(EXAMPLES)).draw(10)) == second


def test_a_stream_is_read_once_and_in_advance(args):
    stream = Stream()
    data = CalibrationData(CONFIG, args, loader_of(stream))
    begun = Stream.readings
    assert begun and numbers_of(data.draw(5)) == numbers_of(data.draw(10)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Stream.readings == begun


def test_a_loader_of_ones_own_is_begun_anew_at_every_step_and_the_training_data_left_alone(args):
    own = [{"input_ids": torch.full((2, 4), number)} for number in range(5)]
    data = CalibrationData(CONFIG, args, None, own)
    assert numbers_of(data.draw(5)) == numbers_of(data.draw(10)) == [[0, 0], [1, 1]]


def test_data_that_only_one_event_could_read_is_refused(args):
    with pytest.raises(ValueError, match="calibration_loader can be read only once"):
        CalibrationData(CONFIG, args, loader_of(EXAMPLES), iter(EXAMPLES))


def test_too_little_data_is_refused_before_the_first_event(args):
    with pytest.raises(ValueError, match="ended after 1 batches, 2 are needed"):
        CalibrationData(CONFIG, args, loader_of(EXAMPLES[:7]))
