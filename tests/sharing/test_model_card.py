"""The card on the Hub: it tells what there is, stays where it is one's own, and bears odd names and numbers."""

import ast
import copy
import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import assert_identical, build_lru, build_model, build_trainer, label_of, weights_of
from hub_fixtures import (
    DETAILS,
    DRAWN,
    NAME,
    RECORD,
    UNIFORM,
    WEIGHTS,
    check_card,
    files_in,
    linked_pictures,
    pushing_trainer,
    reduce,
    saved,
)
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.sharing.hub import PushError, push_compressed, push_folder
from hf_compressm.sharing.model_card import CARD, CardDetails, write_model_card
from hf_compressm.sharing.pictures import PICTURES, write_pictures
from hf_compressm.storage.history import History


def test_the_card_counts_what_is_there(hub, reduced):
    model, history = reduced["per_layer"]
    push_compressed(model, NAME, history)
    now = sum(parameter.numel() for parameter in model.parameters())
    before = sum(parameter.numel() for parameter in build_model().parameters())
    text = hub.files(NAME)[CARD].decode()
    assert f"| parameters | {before / 1e6:.2f} M | {now / 1e6:.2f} M |" in text
    channels = model.config.intermediate_size
    assert f"| {4 * channels * 32 / 1024:.1f} KiB | {4 * channels * 24 / 1024:.1f} KiB |" in text
    cut = history.events[0]
    losses = f"{cut.loss_before:.4f} → {cut.loss_after:.4f}"
    assert f"| after training | 16 → 8-16 | {max(cut.score_discarded):.1%} | {losses} |" in text


def test_the_card_tells_what_was_recalled(hub, reduced):
    model, history = reduced["uniform"]
    push_compressed(model, NAME, history)
    assert "recall of random pairs" not in hub.files(NAME)[CARD].decode()
    history = copy.deepcopy(history)
    history.events[0].recall_before = {"loss": 1.5, "accuracy": 0.75}
    history.events[0].recall_after = {"loss": 2.0, "accuracy": 0.5}
    push_compressed(model, NAME, history)
    text = hub.files(NAME)[CARD].decode()
    assert "| recall of random pairs, nats per value (accuracy) |" in text and "| 1.500 (75%) → 2.000 (50%) |" in text


def card_of(folder: Path, details: CardDetails | None = None, name: str = NAME) -> str:
    write_model_card(folder, name, details)
    text = (folder / CARD).read_text(encoding="utf-8")
    check_card(text)
    assert linked_pictures(text) == {picture for picture in PICTURES if (folder / picture).exists()}
    return text


def test_a_card_written_by_hand_stays(hub, folder, dataset, tmp_path):
    own = "---\nlicense: mit\ntags: [generated_from_trainer]\n---\n# My Mamba\nÄ word of mine.\n"
    (folder / CARD).write_text(own, encoding="utf-8")
    push_folder(folder, NAME)
    assert hub.files(NAME)[CARD].decode() == own
    out = tmp_path / "out"
    out.mkdir()
    (out / CARD).write_text(own, encoding="utf-8")
    trainer = pushing_trainer(out, dataset, hub_strategy="every_save", save_steps=4, hub_model_id="tester/second")
    trainer.train()
    trainer.push_to_hub()
    assert {files[CARD] for files in pushed(hub, "tester/second")} == {own.encode()}


def pushed(hub, name: str) -> list[dict[str, bytes]]:
    return [hub.files(name, oid) for oid in list(hub.repository(name).commits)[1:]]


def test_a_card_of_ours_or_of_trainers_is_written_anew(hub, folder):
    first = card_of(folder)
    (folder / CARD).write_text(first.replace("# model", "# Changed"))
    push_folder(folder, NAME, CardDetails(name="New"))
    assert b"# New" in hub.files(NAME)[CARD]
    trainers = "---\ntags:\n- generated_from_trainer\n---\n<!-- This model card has been generated automatically"
    (folder / CARD).write_text(trainers + " according to the information the Trainer had access to. -->\n")
    push_folder(folder, NAME, CardDetails(name="Newer"))
    assert b"# Newer" in hub.files(NAME)[CARD]


def test_a_card_in_another_encoding_stays(hub, folder):
    (folder / CARD).write_bytes("---\nlicense: mit\n---\nSchöne Wörter\n".encode("latin-1"))
    before = files_in(folder)[CARD]
    with pytest.raises(PushError, match="utf-8"):  # so the client reads it
        push_folder(folder, NAME)
    assert files_in(folder)[CARD] == before


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a: b #c", "a: b #c"),
        ("Mämbä – 5 {{ x }} {% if %}", "Mämbä – 5 {{ x }} {% if %}"),
        ("- [x] *y* 'z' \"", "- \\[x\\] \\*y\\* 'z' \""),
        ("a|b <c> `d` \\1", "a\\|b \\<c\\> \\`d\\` \\\\1"),
        ("yes", "yes"),
        ("12e3", "12e3"),
    ],
)
def test_names_with_odd_characters(hub, folder, name, shown):
    assert f"\n# {shown}\n" in card_of(folder, CardDetails(name=name, tags=[name], license="mit"))
    assert name in ModelCard.load(folder / CARD).data.tags


@pytest.mark.parametrize("kind", ["uniform", "per_layer"])
def test_the_lines_to_copy_name_a_folder_with_odd_characters(hub, reduced, tmp_path, kind):
    name = 'it\'s "my" model\\{{ 1 }}'
    card = card_of(saved(*reduced[kind], tmp_path / "folder"), name=name)
    (call,) = (line for line in card.splitlines() if line.startswith("model = "))
    (argument,) = ast.parse(call).body[0].value.args
    assert argument.value == name
    commands = re.findall(r"`(hf-compressm export .*?)`", card)
    assert commands and all(shlex.split(command)[2] == name for command in commands)


def test_one_name_may_be_given_as_a_string(hub, folder):
    card_of(folder, CardDetails(datasets="tester/data", language="en", tags="tiny"))
    data = ModelCard.load(folder / CARD).data
    assert (data.datasets, data.language, data.tags[-1]) == (["tester/data"], ["en"], "tiny")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_losses_that_are_no_numbers(hub, reduced, tmp_path, loss):
    model, history = reduced["uniform"]
    history = History.from_dict(history.to_dict())
    history.events[0].step = 3
    history.events[0].loss_before = history.events[0].loss_after = None  # a record of NaN or Inf is refused
    log = [{"step": 1, "loss": loss or float("nan")}, {"step": 2, "eval_loss": loss or float("nan")}]
    folder = saved(model, history, tmp_path / "folder")
    write_pictures(folder, history, log)
    text = card_of(folder, CardDetails(log_history=log))
    assert "not measured" in text
    assert linked_pictures(text) == DRAWN


def test_the_speeds_are_those_up_to_the_first_cut_and_after_the_last(hub, reduced, tmp_path):
    model, history = reduced["uniform"]
    history = History.from_dict(history.to_dict())
    history.events[0].step = 3
    folder = saved(model, history, tmp_path / "folder")
    log = [{"step": step, "tokens_per_second": 1000.0 * step} for step in (2, 3, 4, 5)]
    assert "| training speed, tokens per second | 2,000 | 5,000 |" in card_of(folder, CardDetails(log_history=log))
    assert "tokens per second" not in card_of(folder, CardDetails(log_history=log[:2]))  # none after the cut


def test_a_model_that_was_not_cut(hub, dataset, tmp_path):
    """Nothing could be removed: the card says so."""
    config = CompreSSMConfig(tolerance=1e-12, calibration_batches=2)
    trainer = pushing_trainer(tmp_path / "out", dataset, config, hub_strategy="every_save", save_steps=4)
    trainer.train()
    trainer.push_to_hub()
    assert not trainer.state_size_callback.history.standing_cuts
    text = hub.files(NAME)[CARD].decode()
    check_card(text)
    assert "was cut from" not in text and "compressm" not in json.loads(hub.files(NAME)["config.json"])
    assert "nothing was removed" in text


def test_a_model_before_the_first_event(hub, tmp_path):
    push_compressed(build_model(), NAME, History(asdict(UNIFORM)))
    check_card(hub.files(NAME)[CARD].decode())
    assert linked_pictures(hub.files(NAME)[CARD].decode()) == set()


def test_a_model_of_one_layer(hub, batches, tmp_path):
    config = CompreSSMConfig(cut_fraction=0.5, allocation="per_layer", calibration_batches=2)
    model, history = reduce(config, batches, num_hidden_layers=1)
    push_compressed(model, NAME, history)
    assert "**16** to **8** states" in hub.files(NAME)[CARD].decode()
    check_card(hub.files(NAME)[CARD].decode())
    assert_identical(weights_of(AutoModelForCausalLM.from_pretrained(NAME)), weights_of(model))


def test_without_matplotlib_there_are_no_pictures(hub, reduced, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model, history = reduced["uniform"]
    push_compressed(model, NAME, history, details=DETAILS)
    assert not set(PICTURES) & hub.files(NAME).keys() and linked_pictures(hub.files(NAME)[CARD].decode()) == set()


def test_a_model_that_is_no_language_model_gets_trainers_card(hub, dataset, blocks, tmp_path):
    data = dataset.remove_columns("labels").add_column("labels", label_of(blocks).tolist())
    callback = CompreSSMCallback(CompreSSMConfig(target_state_size=8), CompreSSMSchedule(end=0.5, events=1))
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "hub_strategy": "every_save"}
    options |= {"push_to_hub": True, "hub_model_id": NAME}
    trainer = build_trainer(tmp_path / "out", data, [], model=build_lru(), **options)
    callback.attach(trainer, card=CardDetails(license="mit"))
    trainer.train()
    trainer.push_to_hub()
    files = hub.files(NAME)
    assert files.keys() >= WEIGHTS | RECORD and b"generated_from_trainer" in files[CARD]
    assert json.loads(files["config.json"])["compressm"]["state_sizes_after"] == [8, 8]
