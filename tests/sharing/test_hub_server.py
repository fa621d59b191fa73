"""The tests' Hub behaves as the real one, as far as the unmodified clients can tell."""

import os
import subprocess
import sys

import httpx2
import pytest
from conftest import assert_identical, build_model
from hub_server import FINE_GRAINED, READ, STRANGER, WRITE, HubServer
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import MambaForCausalLM

NAME = "tester/model"
CARD = "---\nlicense: apache-2.0\ntags: [mamba]\n---\n# A model\n"


@pytest.fixture(params=["lfs", "xet"])
def hub(request, monkeypatch, tmp_path):
    with HubServer(xet=request.param == "xet") as server:
        server.use_here(monkeypatch, home=tmp_path)
        HfApi().create_repo(NAME)
        yield server


lfs_only = pytest.mark.parametrize("hub", ["lfs"], indirect=True)


@pytest.fixture
def folder(tmp_path):
    contents = {"config.json": b"{}", "README.md": CARD.encode(), "model.safetensors": os.urandom(200_000)}
    (tmp_path / "folder" / "part").mkdir(parents=True)
    for path, content in (contents | {"part/more.bin": os.urandom(100_000), "empty": b""}).items():
        (tmp_path / "folder" / path).write_bytes(content)
    return tmp_path / "folder"


def contents_of(folder) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def status_of(call, *arguments, **options) -> int:
    with pytest.raises(HfHubHTTPError) as error:
        call(*arguments, **options)
    return error.value.response.status_code


def put(path="file", token=WRITE, content=b"content", **options):
    return HfApi(token=token).upload_file(repo_id=NAME, path_or_fileobj=content, path_in_repo=path, **options)


def asked(hub, method, part) -> list:
    """Statuses of the requests of this method with this in their path."""
    return [request.status for request in hub.requests if request.method == method and part in request.path]


def test_a_folder_comes_back_bit_by_bit(hub, folder, tmp_path):
    HfApi().upload_folder(repo_id=NAME, folder_path=folder)
    snapshot_download(NAME, local_dir=tmp_path / "copy")
    sent = contents_of(folder) | {".gitattributes": hub.files(NAME)[".gitattributes"]}
    assert contents_of(tmp_path / "copy") == sent == hub.files(NAME)
    assert len(asked(hub, "PUT", "/lfs/")) == (0 if hub.xet else 2)
    assert len(asked(hub, "GET", "xet-write-token")) == (1 if hub.xet else 0)


def test_transformers_pushes_and_loads_a_model(hub):
    model = build_model()
    model.push_to_hub(NAME, revision="branch")
    assert_identical(MambaForCausalLM.from_pretrained(NAME, revision="branch").state_dict(), model.state_dict())


@lfs_only
def test_another_process_needs_only_the_environment(hub, tmp_path):
    program = "from huggingface_hub import create_repo; create_repo('tester/second', private=True)"
    environment = os.environ | hub.environment(home=tmp_path)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert hub.repository("tester/second").private


@lfs_only
def test_a_private_repository_is_for_its_owner(hub):
    HfApi().create_repo("tester/secret", private=True)
    assert HfApi(token=READ).model_info("tester/secret").private and not HfApi().model_info(NAME).private
    for token in (STRANGER, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("tester/secret")
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("tester/secret", token=token)
    HfApi().delete_repo("tester/secret")
    assert not HfApi().repo_exists("tester/secret")


@lfs_only
def test_who_may_write(hub):
    assert status_of(HfApi().create_repo, NAME) == 409
    assert status_of(HfApi().create_repo, "stranger/model") == 403
    assert status_of(put, token=READ) == status_of(put, token=STRANGER) == status_of(put, token=FINE_GRAINED) == 403
    assert status_of(put, token=False) == status_of(put, token="hf_unknown") == 401
    HfApi(token=FINE_GRAINED).create_repo("tester/allowed")
    HfApi(token=FINE_GRAINED).auth_check("tester/allowed", write=True)
    assert status_of(HfApi(token=READ).auth_check, NAME, write=True) == 403
    roles = [HfApi(token=token).whoami()["auth"]["accessToken"]["role"] for token in (WRITE, READ, FINE_GRAINED)]
    assert roles == ["write", "read", "fineGrained"]
    assert hub.files(NAME).keys() == {".gitattributes"}


def test_branches_tags_and_pull_requests(hub, folder, tmp_path):
    api = HfApi()
    api.create_tag(NAME, tag="start")
    api.create_branch(NAME, branch="branch")
    put("on-branch.bin", revision="branch")
    assert api.upload_folder(repo_id=NAME, folder_path=folder, create_pr=True).pr_num == 1
    assert put("proposed.bin", token=STRANGER, create_pr=True).pr_revision == "refs/pr/2"
    assert hub.files(NAME).keys() == hub.files(NAME, "start").keys() == {".gitattributes"}
    assert hub.files(NAME, "branch").keys() - hub.files(NAME).keys() == {"on-branch.bin"}
    snapshot_download(NAME, revision="refs/pr/1", local_dir=tmp_path / "copy")
    assert contents_of(tmp_path / "copy") == hub.files(NAME, "refs/pr/1")
    refs = api.list_repo_refs(NAME, include_pull_requests=True)
    names = [[ref.name for ref in kind] for kind in (refs.branches, refs.tags, refs.pull_requests)]
    assert names == [["main", "branch"], ["start"], ["refs/pr/1", "refs/pr/2"]]
    assert status_of(api.create_branch, NAME, branch="branch") == 409
    with pytest.raises(RevisionNotFoundError):
        put(revision="nowhere")


@lfs_only
def test_files_of_a_commit(hub, folder):
    api = HfApi()
    first = api.upload_folder(repo_id=NAME, folder_path=folder).oid
    info = api.model_info(NAME, files_metadata=True)
    assert info.sha == first and info.card_data.license == "apache-2.0"
    assert {file.rfilename: file.size for file in info.siblings}["part/more.bin"] == 100_000
    assert [entry.path for entry in api.list_repo_tree(NAME, "part")] == ["part/more.bin"]
    assert [entry.path for entry in api.get_paths_info(NAME, ["config.json", "no"])] == ["config.json"]
    api.delete_folder("part", NAME)
    assert "part/more.bin" not in hub.files(NAME) and "part/more.bin" in hub.files(NAME, first[:7])
    assert status_of(put, parent_commit=first) == 412
    with pytest.raises(EntryNotFoundError):
        api.delete_file("part/more.bin", NAME)


@lfs_only
@pytest.mark.parametrize("wrong", ["license: [", "license: 2", "license: Apache-2.0", "language: English", "- a list"])
def test_a_card_is_checked(hub, folder, wrong):
    ModelCard(CARD).validate()
    (folder / "README.md").write_text(f"---\n{wrong}\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        HfApi().upload_folder(repo_id=NAME, folder_path=folder)
    assert "config.json" not in hub.files(NAME)


@lfs_only
def test_what_the_client_tries_again(hub, folder, tmp_path, monkeypatch):
    hub.fail(method="POST", path="preupload", status=500)
    hub.fail(method="POST", path="objects/batch", status=429, headers={"Retry-After": "0"})
    hub.fail(method="PUT", cut_after=1000)
    HfApi().upload_folder(repo_id=NAME, folder_path=folder)
    assert asked(hub, "POST", "preupload") == [500, 200]
    assert asked(hub, "POST", "objects/batch") == [429, 200]
    assert sorted(map(str, asked(hub, "PUT", "/lfs/"))) == ["200", "200", "None"]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # of its 10 MB it keeps whole ones when it goes on
    hub.fail(method="GET", path="resolve.*safetensors", cut_after=1000)
    snapshot_download(NAME, local_dir=tmp_path / "copy")
    assert asked(hub, "GET", "model.safetensors") == [None, 206]
    assert contents_of(tmp_path / "copy") == hub.files(NAME)


@lfs_only
@pytest.mark.parametrize("status", [401, 403, 409, 429, 500])
def test_what_the_client_gives_up_at_once(hub, folder, status):
    api = HfApi()
    hub.fail(path="repos/create", status=status)
    assert status_of(api.create_repo, "tester/second") == status
    hub.fail(path="/commit/", status=status)
    assert status_of(api.upload_folder, repo_id=NAME, folder_path=folder) == status
    assert asked(hub, "POST", "/commit/") == [status]
    api.create_repo("tester/second")
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert len(asked(hub, "PUT", "/lfs/")) == 2  # what was uploaded before the refusal is not sent again


@lfs_only
def test_an_upload_that_is_refused(hub, folder):
    hub.fail(method="PUT", status=403)
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        HfApi().upload_folder(repo_id=NAME, folder_path=folder)
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert "config.json" not in hub.files(NAME)


def test_a_commit_whose_answer_is_lost(hub, folder):
    hub.fail(path="/commit/", lose_reply=True)
    if hub.xet:
        HfApi().upload_folder(repo_id=NAME, folder_path=folder)
        assert asked(hub, "POST", "/commit/") == [None, 200]
    else:
        with pytest.raises(httpx2.RemoteProtocolError):
            HfApi().upload_folder(repo_id=NAME, folder_path=folder)
    assert "model.safetensors" in hub.files(NAME)
    assert len(hub.repository(NAME).commits) == (3 if hub.xet else 2)  # tried again, it is made again
