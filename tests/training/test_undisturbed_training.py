"""A callback that cuts nothing leaves the losses as they are; where it could not, it is refused at the start."""

import pytest
import torch
from conftest import build_trainer, losses_of
from data_with_state import KINDS, Blocks, SharedIterator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from trainer_callbacks import cutting_callback
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.training.calibration_data import CalibrationData

CONFIG = CompreSSMConfig(tolerance=1e-9, calibration_batches=2)
SCHEDULE = CompreSSMSchedule(start=0.0, end=1.0, events=2, monitor_steps=3)
STEPS = 6
IN_TRAINER = (
    "a stream over one iterator",
    "a data set with NumPy's",
    "a transform",
    "a packing collator",
    "a generator in a closure",
)


def trainer_with(folder, data, collator, callbacks=(), **options) -> Trainer:
    options = {"max_steps": STEPS, "remove_unused_columns": False} | options
    trainer = build_trainer(folder, data, callbacks, **options)
    trainer.data_collator = collator
    return trainer


@pytest.mark.parametrize("kind", IN_TRAINER)
def test_losses_are_those_without_the_callback(tmp_path, blocks, kind):
    build_data, build_collator = KINDS[kind]
    alone = trainer_with(tmp_path, build_data(blocks), build_collator())
    alone.train()
    callback = CompreSSMCallback(CONFIG, SCHEDULE)
    watched = trainer_with(tmp_path, build_data(blocks), build_collator(), [callback])
    watched.train()
    assert len(callback.history.events) == 2 and len(callback.history.observations) == 2
    assert len(losses_of(alone)) == STEPS and losses_of(watched) == losses_of(alone)


def test_a_stream_over_one_iterator_lasts_as_long_as_without_the_callback(tmp_path, blocks):
    data = SharedIterator(blocks[: 8 * STEPS])
    trainer = trainer_with(tmp_path, data, default_data_collator, [CompreSSMCallback(CONFIG, SCHEDULE)])
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_a_run_that_is_resumed_draws_what_one_that_went_through_drew(tmp_path, blocks):
    build_data, build_collator = KINDS["a packing collator"]
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}

    def train(**options) -> CompreSSMCallback:
        callback = CompreSSMCallback(CONFIG, SCHEDULE)
        trainer = trainer_with(tmp_path, build_data(blocks), build_collator(), [callback], **saving)
        trainer.train(**options)
        return callback

    whole = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    of_whole, of_resumed = (callback.history.events[-1] for callback in (whole, resumed))
    assert of_whole.step == of_resumed.step == 12
    assert of_whole.tokens == of_resumed.tokens
    calibrations = [callback._calibration.draw(12) for callback in (whole, resumed)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*calibrations, strict=True))


class GeneratorStream(IterableDataset):
    """It holds an iterator that cannot be copied."""

    def __init__(self, blocks: torch.Tensor):
        self.rows = ({"input_ids": block, "labels": block} for block in blocks)

    def __iter__(self):
        return self.rows


class Restarting(IterableDataset):
    """It cannot be copied, and starts anew each time."""

    def __init__(self, blocks: torch.Tensor):
        self.blocks, self.connection = blocks, (None for _ in blocks)

    def __iter__(self):
        return iter([{"input_ids": block, "labels": block} for block in self.blocks])


def collator_with_a_buffer_in_a_closure():
    kept = []

    def collate(examples: list[dict]) -> dict:
        kept.extend(examples)
        return default_data_collator(kept[-8:][::-1] if len(kept) > 16 else kept[-8:])

    return collate


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), per_device_train_batch_size=8, use_cpu=True)


@pytest.mark.parametrize(
    "loader",
    [
        lambda blocks: DataLoader(GeneratorStream(blocks), 8, collate_fn=default_data_collator),
        lambda blocks: DataLoader(Blocks(blocks[:32]), 8, collate_fn=collator_with_a_buffer_in_a_closure()),
    ],
    ids=["a generator function", "a buffer in a closure"],
)
def test_a_state_that_cannot_be_copied_is_refused(args, blocks, loader):
    with pytest.raises(ValueError, match="would disturb training. Give the callback a calibration_loader"):
        CalibrationData(CONFIG, args, loader(blocks))


def test_a_stream_that_starts_anew_is_taken_where_it_cannot_be_copied(args, blocks):
    data = CalibrationData(CONFIG, args, DataLoader(Restarting(blocks), 8, collate_fn=default_data_collator))
    assert torch.equal(data.draw(3)[1]["input_ids"], blocks[8:16])


class WholeBatches(IterableDataset):
    """A stream of batches."""

    def __init__(self, blocks: torch.Tensor):
        self.batches = [{"input_ids": part, "labels": part} for part in blocks.split(4)]

    def __iter__(self):
        return iter(self.batches)


class Iterable:
    """Batches one after the other, each time from the first, and nothing else."""

    def __init__(self, blocks: torch.Tensor):
        self.batches = WholeBatches(blocks).batches

    def __iter__(self):
        yield from self.batches


def batch_sampler_of(data) -> BatchSampler:
    return BatchSampler(SequentialSampler(data), 4, drop_last=True)


# what get_train_dataloader may return → the number of sequences in each batch that is drawn
LOADERS = {
    "whole batches by number": (lambda blocks: DataLoader(WholeBatches(blocks).batches, batch_size=None), 4),
    "a stream of whole batches": (lambda blocks: DataLoader(WholeBatches(blocks), batch_size=None), 4),
    "a sampler of batches": (
        lambda blocks: DataLoader(
            Blocks(blocks), batch_sampler=batch_sampler_of(blocks), collate_fn=default_data_collator
        ),
        8,
    ),
    "a list of batches": (lambda blocks: WholeBatches(blocks).batches, 4),
    "an iterable of batches": (Iterable, 4),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_are_drawn_from_whatever_training_reads(args, blocks, kind):
    build, sequences = LOADERS[kind]
    data = CalibrationData(CONFIG, args, build(blocks))
    drawn = data.draw(5)
    assert [batch["input_ids"].shape for batch in drawn] == [(sequences, 32)] * 2
    known = {tuple(block.tolist()) for block in blocks}
    assert all(tuple(row) in known for batch in drawn for row in batch["input_ids"].tolist())


class OwnLoader(Trainer):
    """A trainer whose batches come from elsewhere."""

    def get_train_dataloader(self):
        return self.own_loader


@pytest.mark.parametrize("kind", ["a stream of whole batches", "a list of batches", "an iterable of batches"])
def test_a_trainer_with_batches_of_its_own_cuts(tmp_path, blocks, kind):
    trainer = build_trainer(tmp_path, Blocks(blocks), [cutting_callback(calibration_batches=2)])
    trainer.__class__ = OwnLoader
    trainer.own_loader = LOADERS[kind][0](blocks)
    trainer.train()
    assert trainer.model.config.state_size == 4


@pytest.mark.parametrize("own", [lambda batches: (b for b in batches), lambda batches: 5], ids=["generator", "number"])
def test_what_gives_batches_only_once_is_refused(args, blocks, own):
    with pytest.raises(ValueError, match="that training would not miss. Give the callback a calibration_loader"):
        CalibrationData(CONFIG, args, own(WholeBatches(blocks).batches))


def test_data_that_have_no_examples_by_number_are_refused(args, blocks):
    by_name = {f"block {i}": {"input_ids": block, "labels": block} for i, block in enumerate(blocks)}
    loader = DataLoader(by_name, 8, sampler=list(by_name), collate_fn=default_data_collator)
    with pytest.raises(ValueError, match=r"no calibration batches can be drawn .*KeyError.*calibration_loader"):
        CalibrationData(CONFIG, args, loader)


def test_a_loader_with_a_generator_of_its_own_gives_every_event_the_same(args, blocks):
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Blocks(blocks), 8, shuffle=True, generator=generator, collate_fn=default_data_collator)
    before = generator.get_state()
    data = CalibrationData(CONFIG, args, None, loader)
    first, second = data.draw(1), data.draw(2)
    assert torch.equal(first[0]["input_ids"], second[0]["input_ids"])
    assert torch.equal(generator.get_state(), before)


def test_a_loader_with_fewer_batches_is_taken(args, blocks):
    own = [{"input_ids": part} for part in blocks[:24].split(8)]
    config = CompreSSMConfig(tolerance=0.1, calibration_batches=5)
    assert len(CalibrationData(config, args, None, own).draw(1)) == 3
    with pytest.raises(ValueError, match="ended after 2 batches, 3 are needed"):
        refit = CompreSSMConfig(tolerance=0.1, calibration_batches=5, refit=True)
        CalibrationData(refit, args, None, own[:2])
