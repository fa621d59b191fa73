"""In Trainer, what a loss decides is decided by the loss that Trainer trains by, or not at all."""

import pytest
import torch
from conftest import assert_identical, build_model, build_trainer, losses_of, weights_of
from datasets import Dataset
from delay_task import DELAY, delayed_batches, delayed_loss, true_loss
from torch.nn.functional import cross_entropy
from trainer_callbacks import cutting_callback
from transformers import Trainer

BUDGET = {"target_state_size": None, "loss_budget": 0.02}


class DelayTrainer(Trainer):
    """A Trainer whose loss needs what the model knows nothing of; it keeps metrics, and logs."""

    kept: list[float]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = inputs.pop("targets")
        loss, _ = delayed_loss(model, {**inputs, "targets": targets})
        self.kept.append(loss.item())
        if self.state.global_step % 4 == 3:
            self.log({"delayed": loss.item()})
        return (loss, {}) if return_outputs else loss


def delay_trainer(folder, model, callbacks=(), trainer_class=DelayTrainer, data=None, **changes):
    rows = {name: torch.cat([batch[name] for batch in delayed_batches(20)]) for name in ("input_ids", "targets")}
    dataset = Dataset.from_dict(rows if data is None else data).with_format("torch")
    options = {"learning_rate": 1e-5, "remove_unused_columns": False} | changes
    trainer = build_trainer(folder, dataset, callbacks, model, **options)
    trainer.__class__, trainer.kept = trainer_class, []
    return trainer


def test_a_loss_budget_is_held_by_the_loss_of_the_trainer(tmp_path, delay_model):
    before = true_loss(delay_model)
    trainer, callback = delay_trainer(tmp_path, delay_model), cutting_callback(**BUDGET)
    callback.attach(trainer)
    trainer.train()
    events = callback.history.events
    assert 1 < events[-1].state_sizes_after[0] < 16 and true_loss(delay_model) - before < 0.03
    assert events[0].loss_before == pytest.approx(before, abs=0.02)


def test_what_the_loss_of_the_trainer_keeps_and_logs_is_as_without_the_callback(tmp_path, delay_weights):
    runs = []
    for callbacks in ([], [cutting_callback(cut_fraction=1e-6, target_state_size=None)]):
        model = build_model(vocab_size=8, num_hidden_layers=1)
        model.load_state_dict(delay_weights)
        trainer = delay_trainer(tmp_path, model)
        for callback in callbacks:
            callback.attach(trainer)
        trainer.train()
        logged = [entry["delayed"] for entry in trainer.state.log_history if "delayed" in entry]
        runs.append((trainer.kept, logged, losses_of(trainer), weights_of(model)))
    assert runs[0][:3] == runs[1][:3] and len(runs[0][0]) == 20 and len(runs[0][1]) == 5
    assert_identical(runs[0][3], runs[1][3])


def test_without_the_trainer_its_loss_is_not_guessed(tmp_path, delay_model, caplog):
    with pytest.raises(ValueError, match="loss_budget = 0.02 needs the loss .* have no labels: .*callback.attach"):
        delay_trainer(tmp_path, delay_model, [cutting_callback(**BUDGET)]).train()
    callback = cutting_callback()
    delay_trainer(tmp_path, delay_model, [callback]).train()
    assert [event.loss_after for event in callback.history.events] == [None, None]
    assert callback.history.state_sizes == {0: 4}


class LabelledDelayTrainer(Trainer):
    """Its batches have labels, but not as the model's own loss would take them: they lag, and it would shift them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return delayed_loss(model, {**inputs, "targets": inputs["labels"]})[0]


@pytest.fixture
def labelled_data() -> dict:
    batches = delayed_batches(20)
    return {
        "input_ids": torch.cat([batch["input_ids"] for batch in batches]),
        "labels": torch.cat([batch["targets"] for batch in batches]),
    }


def test_a_loss_far_from_what_trainer_logs_decides_nothing(tmp_path, delay_model, labelled_data, caplog):
    callback = cutting_callback(**BUDGET)
    trainer = delay_trainer(tmp_path, delay_model, [callback], LabelledDelayTrainer, labelled_data)
    with pytest.raises(
        ValueError, match=r"the model's own loss is \d.* Trainer logged 0.*: it trains by another loss"
    ):
        trainer.train()
    assert callback.history.events == [] and delay_model.config.state_size == 16 and trainer.state.global_step == 5
    shown = cutting_callback()
    delay_trainer(tmp_path, delay_model, [shown], LabelledDelayTrainer, labelled_data).train()
    assert [event.loss_after for event in shown.history.events] == [None, None]


def test_it_decides_once_the_trainer_is_asked(tmp_path, delay_model, labelled_data):
    before, callback = true_loss(delay_model), cutting_callback(**BUDGET)
    trainer = delay_trainer(tmp_path, delay_model, (), LabelledDelayTrainer, labelled_data)
    callback.attach(trainer)
    trainer.train()
    assert true_loss(delay_model) - before < 0.03 and callback.history.state_sizes[0] < 16


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, DELAY:].flatten(0, 1), labels[:, DELAY:].flatten()
    return cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def test_a_loss_function_gets_the_number_of_items(tmp_path, delay_model, labelled_data):
    callback = cutting_callback(**BUDGET)
    trainer = delay_trainer(tmp_path, delay_model, (), Trainer, labelled_data)
    trainer.compute_loss_func = summed_loss
    callback.attach(trainer)
    expected = true_loss(delay_model) * (32 - DELAY) / 31  # Trainer counts the labels that follow a token
    trainer.train()
    assert callback.history.events[0].loss_before == pytest.approx(expected, abs=0.01)


def test_smoothed_labels_are_smoothed(tmp_path, dataset):
    options = {"label_smoothing_factor": 0.5}
    with pytest.raises(ValueError, match=r"label_smoothing_factor = 0\.5, .*callback\.attach"):
        build_trainer(tmp_path, dataset, [cutting_callback(**BUDGET)], **options).train()
    losses = []
    for attached in (True, False):
        callback = cutting_callback(target_state_size=8)
        trainer = build_trainer(tmp_path, dataset, () if attached else [callback], **options)
        if attached:
            callback.attach(trainer)
        trainer.train()
        losses.append(callback.history.events[0].loss_before)
    logged = losses_of(trainer)[5]
    assert losses[0] == pytest.approx(logged, abs=0.2) and losses[0] - losses[1] > 0.02


def test_a_calibration_loader_without_labels_shows_no_loss_and_decides_nothing(tmp_path, dataset, batches):
    loader = [{"input_ids": batch["input_ids"]} for batch in batches]
    callback = cutting_callback(calibration_loader=loader)
    trainer = build_trainer(tmp_path, dataset)
    callback.attach(trainer)
    trainer.train()
    assert [event.loss_after for event in callback.history.events] == [None, None]
    callback = cutting_callback(calibration_loader=loader, **BUDGET)
    with pytest.raises(ValueError, match="loss_budget = 0.02 needs .* have no labels"):
        build_trainer(tmp_path, dataset, [callback]).train()


# The trial at the start


class ThinMamba(type(build_model())):
    """It passes its last layer by."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        self.backbone.layers, layers = self.backbone.layers[:1], self.backbone.layers
        try:
            return super().forward(input_ids, labels=labels)
        finally:
            self.backbone.layers = layers


class AskingMamba(type(build_model())):
    """It needs what calibration batches do not have."""

    def forward(self, input_ids, labels=None, topic=None):
        return super().forward(input_ids + topic, labels=labels)


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (ThinMamba, r"does not run the scans of the layers \[1\]"),
        (AskingMamba, r"cannot be analysed: its forward pass .*failed with TypeError"),
    ],
)
def test_a_model_that_cannot_be_analysed_is_refused_before_the_first_step(tmp_path, dataset, model_class, message):
    model = build_model()
    model.__class__ = model_class
    trainer = build_trainer(tmp_path, dataset, [cutting_callback()], model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_short_padded_texts_are_refused_before_the_first_step(tmp_path, blocks):
    mask = torch.zeros_like(blocks)
    mask[:, :10] = 1
    data = {"input_ids": blocks, "attention_mask": mask, "labels": blocks.masked_fill(mask == 0, -100)}
    trainer = build_trainer(
        tmp_path, Dataset.from_dict({k: v.tolist() for k, v in data.items()}), [cutting_callback()]
    )
    with pytest.raises(ValueError, match="the calibration sequences are too short"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trainer_with_a_model_that_returns_tuples_is_served(tmp_path, dataset):
    model = build_model()
    model.config.return_dict = False
    callback = cutting_callback()
    build_trainer(tmp_path, dataset, [callback], model).train()
    assert callback.history.state_sizes == {0: 4, 1: 4}
    assert callback.history.events[0].loss_after is not None
