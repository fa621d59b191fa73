"""Recall as it is measured: on a model that has learned it, and loses it with its states."""

import copy
import math

import pytest
import torch
from conftest import assert_identical, build_model, build_trainer, weights_of
from transformers import GPT2Config, GPT2LMHeadModel

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    CompreSSMSchedule,
    LRUConfig,
    LRUForSequenceClassification,
    analyze,
    compress,
    install_scan,
    parameter_groups,
    uninstall_scan,
)
from hf_compressm.analysis.recall import chance, recall_batch, recall_probe
from hf_compressm.architectures.installed_scan import scan_is_installed
from hf_compressm.storage.history import History, load_history, save_history
from hf_compressm.training.messages import event_numbers

PAIRS, TOKENS = 3, 10


@pytest.fixture(scope="module")
def recalling():
    """A model trained on nothing but recall."""
    install_scan()
    model = build_model(vocab_size=TOKENS)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    for step in range(300):
        model(**recall_batch(model, PAIRS, seed=1000 + step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def sequences(recalling):
    return [recall_batch(recalling, PAIRS, seed=9000 + i) for i in range(4)]


def test_each_sequence_tells_pairs_and_asks_for_all_of_them():
    model = build_model(vocab_size=40, bos_token_id=3, eos_token_id=[5, 6], pad_token_id=0)
    batch = recall_batch(model, pairs=8, sequences=50)
    told, asked = batch["input_ids"].view(50, 2, 8, 2).unbind(1)
    labels = batch["labels"].view(50, 2, 8, 2)
    for i in range(50):
        assert dict(told[i].tolist()) == dict(asked[i].tolist())
        assert len(set(told[i].flatten().tolist())) == 16
    assert not torch.equal(told, asked) and not torch.equal(told[0], told[1])
    assert not set(batch["input_ids"].flatten().tolist()) & {0, 3, 5, 6}
    assert torch.equal(labels[:, 1, :, 1], asked[:, :, 1])
    assert (labels[:, 0] == -100).all() and (labels[:, 1, :, 0] == -100).all()
    assert torch.equal(recall_batch(model, 8, 50)["input_ids"], batch["input_ids"])
    assert not torch.equal(recall_batch(model, 8, 50, seed=1)["input_ids"], batch["input_ids"])


def test_the_result_is_loss_and_accuracy_at_the_asked_values(recalling):
    batch = recall_batch(recalling, PAIRS, 20, seed=4)
    with torch.no_grad():
        logits = recalling.eval()(input_ids=batch["input_ids"]).logits.double()
    positions = torch.arange(2 * PAIRS, 4 * PAIRS, 2)  # of the keys, each followed by its value
    values = batch["input_ids"][:, positions + 1]
    probabilities = logits[:, positions].softmax(-1).gather(-1, values.unsqueeze(-1)).squeeze(-1)
    result = recall_probe(recalling, PAIRS, 20, seed=4)
    assert result.loss == pytest.approx(-probabilities.log().mean().item(), abs=1e-5)
    assert result.accuracy == pytest.approx((logits[:, positions].argmax(-1) == values).double().mean().item())


def build_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2))


@pytest.mark.parametrize("untrained", [build_model, build_gpt2])
def test_any_causal_language_model_is_asked_and_one_that_knows_nothing_guesses(untrained):
    model = untrained()
    result = recall_probe(model)
    assert result.loss == pytest.approx(math.log(model.config.vocab_size), rel=0.05)
    assert result.accuracy < chance(8).accuracy == 1 / 8 and chance(8).loss == math.log(8)


def test_the_model_is_not_disturbed(recalling):
    uninstall_scan()
    recalling.train()
    recalling(**recall_batch(recalling, PAIRS, 2)).loss.backward()
    gradients = [parameter.grad.clone() for parameter in recalling.parameters()]
    weights, random_state = weights_of(recalling), torch.get_rng_state()
    recall_probe(recalling, PAIRS)
    assert recalling.training and not scan_is_installed()
    assert all(torch.equal(p.grad, g) for p, g in zip(recalling.parameters(), gradients, strict=True))
    assert_identical(weights_of(recalling), weights) and torch.equal(torch.get_rng_state(), random_state)
    recalling.zero_grad()


def test_what_was_learned_goes_with_the_states(recalling, sequences):
    before = recall_probe(recalling, PAIRS)
    assert before.accuracy > 0.8 > 2 * chance(PAIRS).accuracy
    accuracies = []
    for size in (8, 1):
        model = copy.deepcopy(recalling)
        config = CompreSSMConfig(target_state_size=size, recall_pairs=PAIRS)
        report = analyze(model, sequences, config)
        event = compress(model, report)
        assert report.recall_before == before
        after = recall_probe(model, PAIRS)
        assert after.loss == pytest.approx(report.recall_after.loss, abs=1e-5)
        assert after.accuracy == pytest.approx(report.recall_after.accuracy, abs=0.02)
        assert event.recall_after == vars(report.recall_after)
        accuracies.append(after.accuracy)
    assert before.accuracy - accuracies[0] < 0.1 < 0.3 < before.accuracy - accuracies[1]


def test_it_is_reported_recorded_and_logged_where_it_is_asked_for(recalling, sequences, tmp_path):
    model = copy.deepcopy(recalling)
    report = analyze(model, sequences, CompreSSMConfig(target_state_size=2, recall_pairs=PAIRS))
    *_, losses, recall = str(report).splitlines()
    before, after = report.recall_before, report.recall_after
    assert losses.startswith("measured loss: ") and recall == (
        f"recall of 3 pairs: {before.loss:.4f} → {after.loss:.4f} nats per value, {before.accuracy:.1%} → "
        f"{after.accuracy:.1%} right (by chance 1.0986, 33.3%)"
    )
    event = compress(model, report)
    save_history(History({}, events=[event]), tmp_path)
    assert load_history(tmp_path).events[0].recall_before == {"loss": before.loss, "accuracy": before.accuracy}
    numbers = event_numbers(event)
    assert numbers["recall_loss_before_cut"] == before.loss and numbers["recall_loss_after_cut"] == after.loss
    assert numbers["recall_accuracy_after_cut"] == after.accuracy

    silent = analyze(recalling, sequences, CompreSSMConfig(target_state_size=2))
    assert silent.recall_before is silent.recall_after is None and "recall" not in str(silent)
    assert not any("recall" in name for name in event_numbers(compress(copy.deepcopy(recalling), silent)))


def test_it_reaches_the_log_of_a_trainer(tmp_path, dataset):
    callback = CompreSSMCallback(
        CompreSSMConfig(target_state_size=4, recall_pairs=4), CompreSSMSchedule(end=0.5, events=1)
    )
    trainer = build_trainer(tmp_path, dataset, max_steps=4)
    callback.attach(trainer)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "compressm/recall_loss_before_cut" in entry]
    assert logged["compressm/recall_accuracy_after_cut"] == callback.history.events[0].recall_after["accuracy"]


def test_what_cannot_recall_is_refused(recalling, sequences):
    for pairs in (-1, 1.5, True):
        with pytest.raises(ValueError, match="recall_pairs = .*; allowed: a whole number, 0 for none"):
            CompreSSMConfig(tolerance=0.1, recall_pairs=pairs)
    with pytest.raises(ValueError, match="5 pairs to recall need 10 tokens, MambaForCausalLM has 9: give fewer pairs"):
        analyze(recalling, sequences, CompreSSMConfig(tolerance=0.1, recall_pairs=5))
    options = dict(vocab_size=64, state_size=8, hidden_size=8, num_hidden_layers=2, num_labels=2)
    with pytest.raises(ValueError, match="LRUForSequenceClassification has 0: give fewer pairs, or a causal language"):
        analyze(
            LRUForSequenceClassification(LRUConfig(**options)), None, CompreSSMConfig(tolerance=0.1, recall_pairs=2)
        )
