"""What is pushed in the tests, and to where: a Hub of their own, reduced models, a Trainer; and what must arrive."""

import json
from concurrent import futures
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import build_model, build_trainer
from hub_server import HubServer
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress, install_scan
from hf_compressm.sharing.model_card import CARD, CardDetails
from hf_compressm.sharing.pictures import PICTURES
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import HISTORY_FILE, SPECTRA_FILE, History, load_history, save_history

NAME = "tester/model"
UNIFORM = CompreSSMConfig(target_state_size=4, calibration_batches=2)
PER_LAYER = CompreSSMConfig(cut_fraction=0.5, allocation="per_layer", skip_layers=[1], calibration_batches=2)
DETAILS = CardDetails(
    license="apache-2.0",
    base_model="tester/base",
    datasets=["tester/data"],
    language=["en"],
    tags=["tiny"],
    log_history=[{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "eval_loss": 2.25}],
)
CODE_FILE = "modeling_compressm_mamba.py"
RECORD = {HISTORY_FILE, SPECTRA_FILE, CARD}
DRAWN = set(PICTURES) - {"settling.png"}  # of runs that compare no rankings
WEIGHTS = {"config.json", "model.safetensors"}


@pytest.fixture(params=["lfs"])
def hub(request, monkeypatch, tmp_path):
    with HubServer(xet=request.param == "xet") as server:
        server.use_here(monkeypatch, home=tmp_path)
        yield server


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


@pytest.fixture(scope="module")
def reduced(blocks) -> dict[str, tuple]:
    """Kind → (model, history) after one cut; nobody changes them."""
    install_scan()
    batches = [{"input_ids": block, "labels": block} for block in blocks[:16].split(8)]
    return {"uniform": reduce(UNIFORM, batches), "per_layer": reduce(PER_LAYER, batches)}


def reduce(config: CompreSSMConfig, batches, **changes) -> tuple:
    model = build_model(**changes)
    return model, History(asdict(config), events=[compress(model, analyze(model, batches, config))])


@pytest.fixture
def folder(reduced, tmp_path) -> Path:
    """A reduced model and its history."""
    return saved(*reduced["uniform"], tmp_path / "folder")


def saved(model, history, folder) -> Path:
    model.save_pretrained(folder)
    save_history(history, folder)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def titles(hub, name: str = NAME) -> list[str]:
    """Of all commits but the first, which made the repository."""
    return [commit.title for commit in hub.repository(name).commits.values()][1:]


def check_card(text: str) -> ModelCard:
    """It is valid for the Hub, finished, and shows no picture and no cell that is not there."""
    card = ModelCard(text)
    card.validate()
    assert {"compressm", "mamba"} <= set(card.data.tags) and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert not any(left in text for left in ("None", "\n\n\n", "\n\n|---"))
    return card


def linked_pictures(text: str) -> set[str]:
    return {picture for picture in PICTURES if f"]({picture})" in text}


@pytest.fixture
def spoken(monkeypatch) -> list[str]:
    """The warnings of this library."""
    warnings = []
    logger = transformers_logging.get_logger("hf_compressm.training.publishing")
    monkeypatch.setattr(logger, "warning", lambda text, *args, **kwargs: warnings.append(text))
    return warnings


class Waits(TrainerCallback):
    """For every push in the background, so that each is seen; does `then` after it."""

    def __init__(self, then=None):
        self.then = then

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.push_in_progress is not None:
            futures.wait(self.trainer.push_in_progress.jobs)
        if self.then:
            self.then(state.global_step)


def pushing_trainer(folder, dataset, config=UNIFORM, card=None, events=2, then=None, **changes):
    callback, waits = CompreSSMCallback(config, CompreSSMSchedule(end=0.5, events=events)), Waits(then)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "push_to_hub": True}
    options |= {"hub_model_id": NAME}
    trainer = build_trainer(folder, dataset, [waits], **(options | changes))
    callback.attach(trainer, card=card or CardDetails(license="apache-2.0"))
    waits.trainer = trainer
    return trainer


def steps_done(trainer) -> int:
    return trainer.state.global_step


def check_files(files: dict[str, bytes], folder: Path, sizes: list[int], card: bool = True) -> None:
    """A model with these state sizes, its history and its card, which a user can load."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert check_checkpoint(folder) == dict(enumerate(sizes))
    history = load_history(folder)
    assert history.state_sizes == dict(enumerate(sizes)) or (history.state_sizes is None and set(sizes) == {16})
    config = json.loads(files["config.json"])
    assert config.get("compressm") == json.loads(json.dumps(history.summary()))
    assert (CODE_FILE in files) >= (len(set(sizes)) > 1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert [block.mixer.ssm_state_size for block in model.backbone.layers] == sizes
    text = files[CARD].decode()
    check_card(text)
    assert linked_pictures(text) == set(PICTURES) & files.keys()


def part_of(files: dict[str, bytes], prefix: str) -> dict[str, bytes]:
    """The files directly in this folder of a repository."""
    inside = {name.removeprefix(prefix): content for name, content in files.items() if name.startswith(prefix)}
    return {name: content for name, content in inside.items() if "/" not in name}
