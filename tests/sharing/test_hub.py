"""Sharing on the Hub: what is pushed, by hand or by Trainer, comes back whole; what fails loses nothing."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from concurrent import futures
from dataclasses import asdict
from pathlib import Path
from threading import Event

import pytest
from conftest import LAYERS, assert_identical, build_model, build_trainer, weights_of
from hub_server import FINE_GRAINED, READ, STRANGER, HubServer
from huggingface_hub import HfApi, ModelCard, snapshot_download
from safetensors.torch import load_file
from test_lru import build_lru, label_of
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress, install_scan
from hf_compressm.sharing.hub import PushError, push_compressed, push_folder
from hf_compressm.sharing.model_card import CARD, CardDetails, write_model_card
from hf_compressm.sharing.pictures import PICTURES, write_pictures
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import HISTORY_FILE, SPECTRA_FILE, History, load_history, save_history
from hf_compressm.training.publishing import CODE_FILE

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
RECORD = {HISTORY_FILE, SPECTRA_FILE, CARD}
DRAWN = set(PICTURES) - {"settling.png"}  # of runs that compare no rankings
WEIGHTS = {"config.json", "model.safetensors"}

STOCK = """
    import sys
    sys.modules["hf_compressm"] = None  # importing it would fail
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM

    for kind in ("uniform", "per_layer"):
        name, trusted = f"tester/{kind}", dict(trust_remote_code=True) if kind == "per_layer" else {}
        model = AutoModelForCausalLM.from_pretrained(name, **trusted)
        assert kind == "per_layer" or type(model) is MambaForCausalLM
        assert AutoTokenizer.from_pretrained(name, **trusted).decode([0, 1]) == "a b"
        save_file({n: t.clone() for n, t in model.state_dict().items()}, f"{sys.argv[1]}/{kind}.safetensors")
    try:
        AutoModelForCausalLM.from_pretrained("tester/per_layer", trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without the code it needs")
"""
OURS = """
    import sys
    import hf_compressm
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    for kind in ("uniform", "per_layer"):
        model = AutoModelForCausalLM.from_pretrained(f"tester/{kind}")
        save_file({n: t.clone() for n, t in model.state_dict().items()}, f"{sys.argv[1]}/{kind}.safetensors")
    assert type(model) is hf_compressm.architectures.per_layer.CompreSSMMambaForCausalLM
"""


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def in_a_fresh_process(program: str, hub, home: Path, results: Path) -> dict[str, dict]:
    """Kind → weights, as `program` finds them on the Hub with an empty cache."""
    results.mkdir()
    environment = os.environ | hub.environment(home=home)
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(results)], env=environment, check=True)
    return {kind: load_file(results / f"{kind}.safetensors") for kind in ("uniform", "per_layer")}


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


# By hand


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_pushed_models_load_anywhere(hub, reduced, tokenizer, tmp_path):
    for kind, (model, history) in reduced.items():
        push_compressed(model, f"tester/{kind}", history, tokenizer, DETAILS)
    programs = {"stock": STOCK, "ours": OURS}
    for name, program in programs.items() if not hub.xet else [("stock", STOCK)]:
        found = in_a_fresh_process(program, hub, tmp_path / f"home-{name}", tmp_path / name)
        for kind, (model, _) in reduced.items():
            assert_identical(found[kind], weights_of(model))


@pytest.mark.parametrize("kind", ["uniform", "per_layer"])
def test_what_a_push_tells(hub, reduced, tokenizer, kind):
    model, history = reduced[kind]
    commit = push_compressed(model, NAME, history, tokenizer, DETAILS, commit_message="Half of it")
    assert titles(hub) == ["Half of it"] and commit.oid == HfApi().model_info(NAME).sha
    files, snapshot = hub.files(NAME), Path(snapshot_download(NAME))
    pictures = {"spectra.png", "loss.png"}  # not state_sizes.png: there was no training
    code = {CODE_FILE} if kind == "per_layer" else set()
    expected = WEIGHTS | RECORD | pictures | code
    expected |= {"generation_config.json", "tokenizer.json", "tokenizer_config.json", ".gitattributes"}
    assert files.keys() == expected
    assert all(files[picture].startswith(b"\x89PNG") for picture in pictures)
    assert load_history(snapshot).to_dict() == history.to_dict()
    assert json.loads(files["config.json"])["compressm"] == json.loads(json.dumps(history.summary()))
    info = HfApi().model_info(NAME)
    assert info.card_data.license == "apache-2.0" and info.card_data.base_model == "tester/base"
    assert info.card_data.datasets == ["tester/data"] and info.card_data.language == ["en"]
    assert set(info.tags) >= {"compressm", "mamba", "state-space-model", "tiny"}
    text = files[CARD].decode()
    check_card(text)
    assert linked_pictures(text) == pictures
    assert ("trust_remote_code=True" in text) == (kind == "per_layer") and f'"{NAME}"' in text
    assert f"from **16** to **{'8-16' if kind == 'per_layer' else '4'}** states" in text
    assert "| evaluation loss at the end, nats per prediction | | 2.2500 |" in text


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


def test_where_a_push_goes(hub, reduced):
    model, history = reduced["uniform"]
    push_compressed(model, "model", history, private=True)
    assert hub.repository(NAME).private
    start = hub.files(NAME)
    changed = CardDetails(license="mit")
    push_compressed(model, NAME, history, details=changed, revision="small")
    assert b"license: mit" in hub.files(NAME, "small")[CARD] and hub.files(NAME) == start
    assert push_compressed(model, NAME, history, details=changed, create_pr=True).pr_num == 1
    assert b"license: mit" in hub.files(NAME, "refs/pr/1")[CARD] and hub.files(NAME) == start
    push_compressed(model, NAME, history, details=CardDetails(tags=["more"]), revision="refs/pr/1")
    assert b"- more" in hub.files(NAME, "refs/pr/1")[CARD]
    references = HfApi().list_repo_refs(NAME, include_pull_requests=True)
    assert [branch.name for branch in references.branches] == ["main", "small"]
    push_compressed(model, "laboratory/model", history)
    push_compressed(model, NAME, history, details=changed)
    assert hub.files("laboratory/model").keys() == hub.files(NAME).keys()


def test_a_stranger_may_propose(hub, reduced):
    model, history = reduced["uniform"]
    push_compressed(model, NAME, history)
    options = {"details": CardDetails(license="mit"), "create_pr": True}
    assert push_compressed(model, NAME, history, token=STRANGER, **options).pr_num == 1
    assert push_compressed(model, "model", history, **options).pr_num == 2


def test_only_the_model_of_a_folder_is_pushed(hub, folder):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "_private", ".hidden"):
        (folder / name).write_bytes(b"not of the model")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"not of the model")
    push_folder(folder, NAME)
    assert hub.files(NAME).keys() == WEIGHTS | RECORD | {"generation_config.json", ".gitattributes"}


# By Trainer


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
    assert check_checkpoint(folder) == sizes
    history = load_history(folder)
    assert history.state_sizes in (sizes, None if sizes == [16] * LAYERS else sizes)
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


STRATEGIES = {
    "end": ("", UNIFORM),
    "every_save": ("", PER_LAYER),
    "checkpoint": ("last-checkpoint/", PER_LAYER),
    "all_checkpoints": ("checkpoint-{step}/", UNIFORM),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_push_of_trainer_is_whole(hub, dataset, tmp_path, strategy):
    prefix, config = STRATEGIES[strategy]
    options = {"hub_strategy": strategy, "hub_private_repo": True, "save_total_limit": 1}
    trainer = pushing_trainer(tmp_path / "out", dataset, config, **options)
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
    check_files(part_of(files, ""), tmp_path / "end", history.state_sizes)
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
            before.update(contents(tmp_path / "out"))
        elif step == 4:
            assert contents(tmp_path / "out") == before
        elif step == 6:
            may_go_on.set()

    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Waits))
    monkeypatch.setattr(callback, "on_save", lambda args, state, control, **kwargs: on_save(state.global_step))
    trainer.train()
    oid = next(oid for oid, commit in hub.repository(NAME).commits.items() if commit.title.endswith("step 2"))
    check_files(hub.files(NAME, oid), tmp_path / "pushed", [8, 16])


# What fails


@pytest.mark.parametrize("token", [None, "hf_unknown", READ, STRANGER, FINE_GRAINED])
@pytest.mark.parametrize("exists", [True, False])
def test_who_may_not_push_is_told_before_anything_is_done(hub, folder, reduced, monkeypatch, token, exists):
    if exists:
        HfApi().create_repo(NAME)
    monkeypatch.setenv("HF_TOKEN", token or "")
    before, (model, history) = contents(folder), reduced["uniform"]
    advice = "hf auth login" if token in (None, "hf_unknown") else "write access"
    with pytest.raises(PushError, match=f"could not push to {NAME}: .*{advice}"):
        push_folder(folder, NAME)
    monkeypatch.setattr(model, "save_pretrained", lambda *arguments: pytest.fail("something was written"))
    with pytest.raises(PushError, match=advice):
        push_compressed(model, NAME, history, token=token)
    assert contents(folder) == before
    assert hub.repositories.keys() == ({("model", NAME)} if exists else set())
    assert not exists or titles(hub) == []


@pytest.mark.parametrize("token", [None, "hf_unknown", READ])
def test_who_may_not_propose_is_told_before_anything_is_done(hub, folder, monkeypatch, token):
    HfApi().create_repo(NAME)
    monkeypatch.setenv("HF_TOKEN", token or "")
    before = contents(folder)
    with pytest.raises(PushError, match="write access" if token == READ else "hf auth login"):
        push_folder(folder, NAME, create_pr=True)
    assert contents(folder) == before


def test_a_proposal_to_nowhere(hub, folder):
    with pytest.raises(PushError, match="There is no such repository"):
        push_folder(folder, "tester/nowhere", create_pr=True)
    assert not hub.repositories


def test_a_token_that_may_not_push_stops_trainer_before_the_first_step(hub, dataset, tmp_path):
    HfApi().create_repo(NAME)
    trainer = pushing_trainer(tmp_path / "out", dataset, hub_token=READ)  # Trainer itself is content with it
    with pytest.raises(PushError, match="write access"):
        trainer.train()
    assert steps_done(trainer) == 0 and titles(hub) == [] and not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_callback_that_is_not_attached_does_not_push(hub, dataset, tmp_path):
    callback = CompreSSMCallback(UNIFORM)
    trainer = build_trainer(tmp_path / "out", dataset, [callback], push_to_hub=True, hub_model_id=NAME)
    with pytest.raises(ValueError, match=r"push_to_hub=True: call callback.attach\(trainer\)"):
        trainer.train()
    assert steps_done(trainer) == 0


FAULTS = {
    "401": ({"path": "/commit/", "status": 401}, "hf auth login"),
    "403": ({"method": "PUT", "status": 403}, "write access"),
    "409": ({"path": "/commit/", "status": 409}, "changed at the same time"),
    "412": ({"path": "/commit/", "status": 412}, "changed at the same time"),
    "429": ({"path": "/commit/", "status": 429, "headers": {"Retry-After": "7"}}, "asks to wait"),
    "500": ({"path": "/commit/", "status": 500}, "Try again"),
    "cut": ({"method": "PUT", "cut_after": 1000, "times": 100}, "Try again"),
    "batch": ({"path": "objects/batch", "status": 500, "times": 100}, "Try again"),
    "reply": ({"path": "/commit/", "lose_reply": True}, "Try again"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_fails_says_what_to_do_and_can_be_done_again(hub, folder, monkeypatch, fault):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    fault, advice = FAULTS[fault]
    before = contents(folder)
    hub.fail(**fault)
    with pytest.raises(PushError) as error:
        push_folder(folder, NAME, CardDetails(license="mit"))
    text = str(error.value)
    assert text.startswith(f"could not push to {NAME}: ") and advice in text and "\n" not in text
    assert ". " in text.removeprefix(f"could not push to {NAME}: ")  # what happened. What to do.
    assert {name: content for name, content in contents(folder).items() if name != CARD} == before
    hub.faults.clear()
    push_folder(folder, NAME, CardDetails(license="mit"))
    assert hub.files(NAME).items() >= contents(folder).items()
    sent = [request for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert len(sent) == 2  # weights and spectra: none of them twice


def test_a_hub_that_cannot_be_reached(folder, monkeypatch, tmp_path):
    with HubServer() as hub:
        hub.use_here(monkeypatch, home=tmp_path)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    before = contents(folder)
    with pytest.raises(PushError, match="Try again; nothing was lost here"):
        push_folder(folder, NAME)
    assert contents(folder) == before


def test_a_push_in_the_background_that_fails_is_told_and_training_goes_on(hub, dataset, tmp_path, spoken):
    """The first of four: those after it work."""
    trainer = pushing_trainer(tmp_path / "out", dataset, hub_strategy="every_save")
    hub.fail(path="/commit/", status=403)
    trainer.train()
    assert steps_done(trainer) == 8 and len(spoken) == 1
    assert "A checkpoint was not pushed" in spoken[0] and "write access" in spoken[0]
    assert str(tmp_path / "out") in spoken[0]
    assert titles(hub) == [f"Training in progress, step {step}" for step in (4, 6, 8)]
    check_files(contents(tmp_path / "out" / "checkpoint-2"), tmp_path / "copy", [8, 8])


def test_the_last_push_in_the_background_that_fails_is_told_once(hub, dataset, tmp_path, spoken):
    fail = {6: lambda: hub.fail(path="/commit/", status=409)}
    trainer = pushing_trainer(
        tmp_path / "out", dataset, hub_strategy="checkpoint", then=lambda step: fail.get(step, lambda: None)()
    )
    trainer.train()
    trainer.push_to_hub()
    assert len(spoken) == 1 and "changed at the same time" in spoken[0]
    assert titles(hub)[-1] == "End of training"


def test_a_card_the_hub_would_refuse(hub, folder, dataset, tmp_path):
    details = CardDetails(license="Apache 2")
    with pytest.raises(PushError, match='"license" must be one of .* Correct it'):
        push_folder(folder, NAME, details)
    trainer = pushing_trainer(tmp_path / "out", dataset, card=details)
    with pytest.raises(PushError, match='"license" must be one of .* Correct it'):
        trainer.train()
    assert steps_done(trainer) == 0 and titles(hub) == []


def test_what_is_no_reduced_language_model_is_not_pushed(hub, dataset, reduced, tmp_path):
    model, history = reduced["uniform"]
    model.save_pretrained(tmp_path / "bare")
    saved(build_lru(), history, tmp_path / "lru")
    damaged = saved(model, history, tmp_path / "damaged")
    (damaged / HISTORY_FILE).write_text("{")
    for name, error in {"bare": FileNotFoundError, "lru": ValueError, "damaged": ValueError}.items():
        with pytest.raises(error):
            push_folder(tmp_path / name, NAME)
    assert not hub.repositories


# The card


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
    before = contents(folder)[CARD]
    with pytest.raises(PushError, match="utf-8"):  # so the client reads it
        push_folder(folder, NAME)
    assert contents(folder)[CARD] == before


@pytest.mark.parametrize("name", ["a: b #c", "Mämbä – 5 {{ x }} {% if %}", "- [x] *y* 'z' \"", "yes", "12e3"])
def test_names_with_odd_characters(hub, folder, name):
    assert f"\n# {name}\n" in card_of(folder, CardDetails(name=name, tags=[name], license="mit"))
    assert name in ModelCard.load(folder / CARD).data.tags


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
