"""A push that fails says what to do, loses nothing, and can be done again."""

import pytest
from conftest import build_lru, build_trainer
from hub_fixtures import NAME, UNIFORM, check_files, files_in, pushing_trainer, saved, steps_done, titles
from hub_server import FINE_GRAINED, READ, STRANGER, HubServer
from huggingface_hub import HfApi

from hf_compressm import CompreSSMCallback
from hf_compressm.sharing.hub import PushError, push_compressed, push_folder
from hf_compressm.sharing.model_card import CARD, CardDetails
from hf_compressm.storage.history import HISTORY_FILE


@pytest.mark.parametrize("token", [None, "hf_unknown", READ, STRANGER, FINE_GRAINED])
@pytest.mark.parametrize("exists", [True, False])
def test_who_may_not_push_is_told_before_anything_is_done(hub, folder, reduced, monkeypatch, token, exists):
    if exists:
        HfApi().create_repo(NAME)
    monkeypatch.setenv("HF_TOKEN", token or "")
    before, (model, history) = files_in(folder), reduced["uniform"]
    advice = "hf auth login" if token in (None, "hf_unknown") else "write access"
    with pytest.raises(PushError, match=f"could not push to {NAME}: .*{advice}"):
        push_folder(folder, NAME)
    monkeypatch.setattr(model, "save_pretrained", lambda *arguments: pytest.fail("something was written"))
    with pytest.raises(PushError, match=advice):
        push_compressed(model, NAME, history, token=token)
    assert files_in(folder) == before
    assert hub.repositories.keys() == ({("model", NAME)} if exists else set())
    assert not exists or titles(hub) == []


@pytest.mark.parametrize("token", [None, "hf_unknown", READ])
def test_who_may_not_propose_is_told_before_anything_is_done(hub, folder, monkeypatch, token):
    HfApi().create_repo(NAME)
    monkeypatch.setenv("HF_TOKEN", token or "")
    before = files_in(folder)
    with pytest.raises(PushError, match="write access" if token == READ else "hf auth login"):
        push_folder(folder, NAME, create_pr=True)
    assert files_in(folder) == before


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
    before = files_in(folder)
    hub.fail(**fault)
    with pytest.raises(PushError) as error:
        push_folder(folder, NAME, CardDetails(license="mit"))
    text = str(error.value)
    assert text.startswith(f"could not push to {NAME}: ") and advice in text and "\n" not in text
    assert ". " in text.removeprefix(f"could not push to {NAME}: ")  # what happened. What to do.
    assert {name: content for name, content in files_in(folder).items() if name != CARD} == before
    hub.faults.clear()
    push_folder(folder, NAME, CardDetails(license="mit"))
    assert hub.files(NAME).items() >= files_in(folder).items()
    sent = [request for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert len(sent) == 2  # weights and spectra: none of them twice


def test_a_hub_that_cannot_be_reached(folder, monkeypatch, tmp_path):
    with HubServer() as hub:
        hub.use_here(monkeypatch, home=tmp_path)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    before = files_in(folder)
    with pytest.raises(PushError, match="Try again; nothing was lost here"):
        push_folder(folder, NAME)
    assert files_in(folder) == before


def test_a_push_in_the_background_that_fails_is_told_and_training_goes_on(hub, dataset, tmp_path, spoken):
    """The first of four: those after it work."""
    trainer = pushing_trainer(tmp_path / "out", dataset, hub_strategy="every_save")
    hub.fail(path="/commit/", status=403)
    trainer.train()
    assert steps_done(trainer) == 8 and len(spoken) == 1
    assert "A checkpoint was not pushed" in spoken[0] and "write access" in spoken[0]
    assert str(tmp_path / "out") in spoken[0]
    assert titles(hub) == [f"Training in progress, step {step}" for step in (4, 6, 8)]
    check_files(files_in(tmp_path / "out" / "checkpoint-2"), tmp_path / "copy", [8, 8])


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
