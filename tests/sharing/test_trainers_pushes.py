"""What Trainer pushes while it trains, by every strategy: each push is whole and of one moment."""

from threading import Event

import pytest
from conftest import assert_identical, weights_of
from hub_fixtures import (
    DRAWN,
    NAME,
    PER_LAYER,
    RECORD,
    UNIFORM,
    Waits,
    check_files,
    files_in,
    part_of,
    pushing_trainer,
    titles,
)
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_compressm.sharing.model_card import CARD, CardDetails
from hf_compressm.storage.history import load_history

STRATEGIES = {
    "end": ("", UNIFORM),
    "every_save": ("", PER_LAYER),
    "checkpoint": ("last-checkpoint/", PER_LAYER),
    "all_checkpoints": ("checkpoint-{step}/", UNIFORM),
}


class PushInTurn(TrainerCallback):
    """A checkpoint waits for its push: Trainer leaves out one that is due while another is under way."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_push_of_trainer_is_whole(hub, dataset, tmp_path, strategy):
    prefix, config = STRATEGIES[strategy]
    # Without save_total_limit: Trainer deletes old checkpoints while the client may still be listing the folder.
    options = {"hub_strategy": strategy, "hub_private_repo": True}
    trainer = pushing_trainer(tmp_path / "out", dataset, config, **options)
    trainer.add_callback(PushInTurn(trainer))
    trainer.train()
    history = trainer.state_size_callback.history
    assert history.steps == [2, 4] and len(titles(hub)) == {"end": 0, "every_save": 4}.get(strategy, 8)
    trainer.push_to_hub()
    # The client makes no commit where nothing changed: the last checkpoint was of the last step.
    assert ("End of training" in titles(hub)) == (strategy == "end") and hub.repository(NAME).private
    for oid, commit in hub.repository(NAME).commits.items():
        if "Training in progress" not in commit.title:
            continue
        step = int(commit.title.removesuffix(", checkpoint").rpartition(" ")[2])
        sizes = history.events[0 if step < 4 else 1].state_sizes_after
        where = prefix.format(step=step) if commit.title.endswith("checkpoint") else ""
        check_files(part_of(hub.files(NAME, oid), where), tmp_path / oid, sizes)
        assert where == "" or "optimizer.pt" in part_of(hub.files(NAME, oid), where)
    files = hub.files(NAME)
    check_files(part_of(files, ""), tmp_path / "end", list(history.state_sizes.values()))
    assert files.keys() >= {*DRAWN, *RECORD} and load_history(tmp_path / "end").to_dict() == history.to_dict()
    assert b"license: apache-2.0" in files[CARD]
    assert_identical(weights_of(AutoModelForCausalLM.from_pretrained(NAME)), weights_of(trainer.model))


def test_a_branch_of_trainers_own(hub, dataset, tmp_path):
    options = {"hub_revision": "small", "hub_strategy": "every_save", "save_steps": 8}
    trainer = pushing_trainer(tmp_path / "out", dataset, **options)
    trainer.train()
    trainer.push_to_hub(language="en")
    check_files(hub.files(NAME, "small"), tmp_path / "pushed", [4, 4])
    assert hub.files(NAME).keys() == {".gitattributes"}
    assert titles(hub) == ["Training in progress, step 8", "End of training"]


def test_trainer_pushes_when_asked_only_at_the_end(hub, dataset, tmp_path):
    trainer = pushing_trainer(tmp_path / "out", dataset, push_to_hub=False, save_strategy="no")
    trainer.train()
    trainer.push_to_hub("Done", finetuned_from="tester/base", dataset_tags="tester/data", dataset="Data", tags="new")
    assert titles(hub) == ["Done"]
    check_files(hub.files(NAME), tmp_path / "pushed", [4, 4])
    data = ModelCard(hub.files(NAME)[CARD].decode()).data
    assert data.base_model == "tester/base" and data.datasets == ["tester/data"] and "new" in data.tags


def test_what_attach_was_told_of_the_card_stays(hub, dataset, tmp_path):
    card = CardDetails(license="mit", tags=["mine"], datasets=["tester/data"], language=["en"])
    trainer = pushing_trainer(tmp_path / "out", dataset, card=card, save_strategy="no")
    trainer.model.add_model_tags(["of-the-model"])
    trainer.train()
    trainer.push_to_hub(language="de")
    data = ModelCard(hub.files(NAME)[CARD].decode()).data
    assert {"mine", "of-the-model"} <= set(data.tags) and data.license == "mit"
    assert data.datasets == ["tester/data"] and data.language == ["de"]


def test_nothing_changes_under_a_push_in_progress(hub, dataset, tmp_path, monkeypatch):
    """A slow push goes on while the next checkpoints are saved: it is of one moment."""
    may_go_on, taken = Event(), Event()

    def wait(method, path):
        if method == "PUT":
            taken.set()
            may_go_on.wait(30)
        return type(hub).next_fault(hub, method, path)

    monkeypatch.setattr(hub, "next_fault", wait)
    trainer = pushing_trainer(tmp_path / "out", dataset, PER_LAYER, hub_strategy="every_save")
    before = {}

    def on_save(step):
        if step == 2:
            assert taken.wait(30)
            before.update(files_in(tmp_path / "out"))
        elif step == 4:
            assert files_in(tmp_path / "out") == before
        elif step == 6:
            may_go_on.set()

    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Waits))
    monkeypatch.setattr(callback, "on_save", lambda args, state, control, **kwargs: on_save(state.global_step))
    trainer.train()
    oid = next(oid for oid, commit in hub.repository(NAME).commits.items() if commit.title.endswith("step 2"))
    check_files(hub.files(NAME, oid), tmp_path / "pushed", [8, 16])
