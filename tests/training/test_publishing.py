"""What Trainer writes of a reduced model: pictures beside every model saved at the end, and what a card was told."""

import pytest
from conftest import build_trainer
from huggingface_hub import ModelCard

from hf_compressm import CardDetails, CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.sharing.pictures import PICTURES
from hf_compressm.storage.history import load_history
from hf_compressm.training import publishing

DRAWN = set(PICTURES) - {"settling.png"}  # rankings were not compared


@pytest.fixture
def trainer(tmp_path, dataset):
    """A trainer that saves after four of eight steps, and after the last."""
    trainer = build_trainer(tmp_path / "run", dataset, max_steps=8, save_strategy="steps", save_steps=4)
    callback = CompreSSMCallback(CompreSSMConfig(target_state_size=4), CompreSSMSchedule(end=0.5, events=1))
    callback.attach(trainer, card=CardDetails(tags=["mine"]))
    trainer.train()
    return trainer


def pictures_in(folder) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def test_a_model_has_its_pictures_wherever_it_is_saved_and_a_checkpoint_does_not_wait_for_them(trainer, tmp_path):
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {"checkpoint-4", "checkpoint-8"}
    assert all(
        load_history(run / name).steps == [4] and not pictures_in(run / name)
        for name in ("checkpoint-4", "checkpoint-8")
    )
    for folder in (tmp_path / "small-mamba", run / "best", run):
        trainer.save_model(str(folder))
        assert pictures_in(folder) == DRAWN and load_history(folder).steps == [4]


def test_the_card_holds_what_trainer_was_told_of_it(trainer, tmp_path):
    trainer.save_model()
    trainer.create_model_card(
        language="en",
        license="mit",
        tags="new",
        model_name="Small Mamba",
        finetuned_from="tester/base",
        tasks=["text-generation", "summarization"],
        dataset_tags="tester/data",
    )
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "# Small Mamba\n" in card.text
    assert (card.data.language, card.data.license, card.data.base_model) == (["en"], "mit", "tester/base")
    assert card.data.datasets == ["tester/data"] and {"mine", "new", "summarization"} <= set(card.data.tags)


def test_a_name_given_to_attach_stays_and_what_the_card_cannot_hold_is_said(trainer, tmp_path, monkeypatch):
    trainer.save_model()
    trainer.card_details.name = "Mine"
    heard = []
    monkeypatch.setattr(publishing.logger, "warning", heard.append)
    trainer.create_model_card(model_name="run", dataset="My data")
    assert "# Mine\n" in ModelCard.load(tmp_path / "run" / "README.md").text
    assert len(heard) == 1 and "dataset = 'My data'" in heard[0] and "dataset_tags" in heard[0]
