"""What is pushed by hand comes back whole, for whoever may push, wherever it goes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import assert_identical, weights_of
from hub_fixtures import CODE_FILE, DETAILS, NAME, RECORD, WEIGHTS, check_card, linked_pictures, titles
from hub_server import STRANGER
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file

from hf_compressm.sharing.hub import push_compressed, push_folder
from hf_compressm.sharing.model_card import CARD, CardDetails
from hf_compressm.storage.history import load_history

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
    assert type(model) is hf_compressm.architectures.selective.per_layer.CompreSSMMambaForCausalLM
"""


def in_a_fresh_process(program: str, hub, home: Path, results: Path) -> dict[str, dict]:
    """Kind → weights, as `program` finds them on the Hub with an empty cache."""
    results.mkdir()
    environment = os.environ | hub.environment(home=home)
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(results)], env=environment, check=True)
    return {kind: load_file(results / f"{kind}.safetensors") for kind in ("uniform", "per_layer")}


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
