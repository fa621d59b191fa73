"""TRL's SFTTrainer with the callback: every kind of its data, cut and resumed, and its card with ours below it."""

import pytest
import torch
from conftest import VOCABULARY, assert_identical, build_model, losses_of, weights_of
from datasets import Dataset
from hub_fixtures import NAME, RECORD, WEIGHTS, Waits
from huggingface_hub import ModelCard
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_compressm import CardDetails, CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.architectures import state_sizes
from hf_compressm.sharing.hub import push_folder
from hf_compressm.sharing.model_card import CARD, SECTION
from hf_compressm.storage.checkpoint import check_complete
from hf_compressm.storage.history import load_history

CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<end>"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
PER_LAYER = {"cut_fraction": 0.5, "allocation": "per_layer", "skip_layers": [1]}
# Kind of data → options of SFTConfig, goal.
KINDS = {
    "padded": ({}, {"target_state_size": 4}),
    "packed": ({"packing": True}, PER_LAYER),  # TRL's default: whole documents in one row, without padding
    "wrapped": ({"packing": True, "packing_strategy": "wrapped"}, {"target_state_size": 4}),
    "completions": ({}, {"target_state_size": 4}),
    "chats": ({"assistant_only_loss": True}, {"loss_budget": 1.0}),
}


@pytest.fixture(scope="module")
def tokenizer(verses) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(verses, vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>", chat_template=CHAT)


def examples(verses: list[str], kind: str) -> Dataset:
    halves = [verse.split(":", 1) if ":" in verse else (verse, " Selah") for verse in verses[:120]]
    if kind == "completions":
        return Dataset.from_list([{"prompt": first, "completion": second} for first, second in halves])
    if kind == "chats":
        roles = "user", "assistant"
        pairs = [[dict(role=r, content=text) for r, text in zip(roles, pair, strict=True)] for pair in halves]
        return Dataset.from_list([{"messages": pair} for pair in pairs])
    return Dataset.from_dict({"text": verses[:120]})


@pytest.fixture
def build(verses, tokenizer):
    """Build an attached SFTTrainer of eight steps, cut after the third and the sixth and saved after every fourth."""

    def build(folder, kind: str = "padded", card: CardDetails | None = None, callbacks=(), **changes) -> SFTTrainer:
        options, goal = KINDS[kind]
        options = options | {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
        options |= {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_length": 32, "use_cpu": True}
        options |= {"report_to": "none", "disable_tqdm": True} | changes
        trainer = SFTTrainer(
            model=build_model(),
            args=SFTConfig(str(folder), **options),
            train_dataset=examples(verses, kind),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        callback = CompreSSMCallback(
            CompreSSMConfig(calibration_batches=2, **goal), CompreSSMSchedule(end=0.75, events=2)
        )
        callback.attach(trainer, card)
        return trainer

    return build


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "wrapped")) for kind in KINDS]
)
def test_every_kind_of_data_trains_is_cut_and_resumes_exactly(tmp_path, build, kind):
    trainer = build(tmp_path / "a", kind)
    trainer.train()
    assert trainer.state_size_callback.history.steps == [3, 6] and max(state_sizes(trainer.model).values()) <= 16
    assert trainer.state_size_callback.history.standing_cuts
    for step in (4, 8):
        check_complete(tmp_path / "a" / f"checkpoint-{step}")

    resumed = build(tmp_path / "b", kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses_of(resumed) == losses_of(trainer)
    assert_identical(weights_of(resumed.model), weights_of(trainer.model))

    resumed.save_model(str(tmp_path / "small"))
    assert load_history(tmp_path / "small").steps == [3, 6]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert state_sizes(model) == state_sizes(trainer.model)
    assert_identical(weights_of(model), weights_of(trainer.model))


def test_a_loss_measured_at_a_cut_is_that_of_the_tokens_that_are_trained(tmp_path, build):
    trainer = build(tmp_path, "completions", save_strategy="no", bf16=False)
    trainer.train()
    callback = trainer.state_size_callback
    batches = callback._calibration.draw(step=6)
    masked = [batch["labels"] == -100 for batch in batches]
    assert all(mask.any() and not mask.all() for mask in masked)
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model.eval(), dict(batch)).item() for batch in batches]
        of_model = [trainer.model(**batch).loss.item() for batch in batches]
    assert losses == pytest.approx(of_model, rel=1e-5)


def test_documents_in_one_row_flow_into_each_other(tmp_path, build):
    """A Mamba has no use for the boundaries that TRL hands on; docs/training.md says so."""
    trainer = build(tmp_path, "packed")
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1 and batch["seq_idx"].max() > 1
    model, of_second = trainer.model.eval(), batch["seq_idx"][0] == 1
    with torch.no_grad():
        packed = model(**batch).logits[0, of_second]
        alone = model(input_ids=batch["input_ids"][:, of_second]).logits[0]
    assert not torch.allclose(packed, alone, atol=1e-3)


def card_of(folder) -> ModelCard:
    card = ModelCard.load(folder / CARD)
    assert card.text.count(f"\n# {SECTION}\n") == 1 and card.text.rstrip().endswith("it is not written again -->")
    assert card.text.index("Cite TRL as") < card.text.index(SECTION)
    assert {"trl", "sft", "generated_from_trainer", "compressm", "mamba"} <= set(card.data.tags)
    assert len(set(card.data.tags)) == len(card.data.tags)
    return card


def test_trls_card_comes_at_any_moment_with_its_keywords_and_ours_below_it(tmp_path, build):
    trainer = build(tmp_path, card=CardDetails(license="mit", datasets=["tester/mine"], tags=["tiny"]))
    trainer.create_model_card(model_name="Early", tags="first")  # nothing was saved yet
    card = card_of(tmp_path)
    assert "# Model Card for Early\n" in card.text and "with **16** states per channel" in card.text
    assert {"first", "tiny"} <= set(card.data.tags) and card.data.license == "mit"

    trainer.train()
    card = card_of(tmp_path)  # as of the last checkpoint
    assert f"# Model Card for {tmp_path.name}\n" in card.text and "from **16** to **4** states" in card.text
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert f"| {parameters / 1e6:.2f} M |" in card.text

    trainer.create_model_card("Late", "tester/data", ["second"])
    card = card_of(tmp_path)
    assert "# Model Card for Late\n" in card.text and "second" in card.data.tags and "first" not in card.data.tags
    assert card.data.datasets == ["tester/data", "tester/mine"]

    (tmp_path / CARD).write_text("My own words.\n")
    trainer.create_model_card(model_name="Again")
    assert (tmp_path / CARD).read_text() == "My own words.\n"


def test_pushes_carry_trls_card_and_ours(hub, build, tmp_path):
    waits = Waits()
    options = {"push_to_hub": True, "hub_model_id": NAME, "hub_strategy": "checkpoint"}
    waits.trainer = trainer = build(tmp_path / "out", card=CardDetails(license="mit"), callbacks=[waits], **options)
    trainer.train()
    files = hub.files(NAME)
    assert files.keys() >= WEIGHTS | RECORD | {"spectra.png"}
    assert files[f"last-checkpoint/{CARD}"] == files[CARD] and b"](spectra.png)" in files[CARD]
    trainer.push_to_hub(dataset_name="tester/data", tags=["new"])
    card = card_of(tmp_path / "out")
    assert hub.files(NAME)[CARD].decode() == str(card) and "# Model Card for model\n" in card.text
    assert card.data.datasets == ["tester/data"] and "new" in card.data.tags and card.data.license == "mit"

    push_folder(tmp_path / "out", "tester/second", CardDetails(license="apache-2.0"))  # TRL's part stays there, too
    card = card_of(tmp_path / "out")
    assert card.data.license == "apache-2.0" and "# Model Card for model\n" in card.text
    assert 'from_pretrained("tester/second")' in card.text


def test_trls_own_card_is_what_it_would_be_without_us(tmp_path, build):
    trainer = build(tmp_path / "a")
    trainer.create_model_card(model_name="Name", dataset_name="tester/data", tags=["mine"])
    above = ModelCard.load(tmp_path / "a" / CARD)
    SFTTrainer.create_model_card(trainer, model_name="Name", dataset_name="tester/data", tags=["mine"])
    alone = ModelCard.load(tmp_path / "a" / CARD)
    assert above.text.startswith(alone.text.rstrip())
    assert set(alone.data.tags) <= set(above.data.tags)
    others = {name: value for name, value in alone.data.to_dict().items() if name not in ("tags", "datasets")}
    assert others.items() <= above.data.to_dict().items()
