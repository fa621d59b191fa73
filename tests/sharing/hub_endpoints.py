"""The endpoints of the tests' Hub: what a request is answered. URLs, statuses and shapes are those of the Hub."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from hub_card import card_errors, card_metadata
from hub_storage import BRANCH, PULL_REQUEST, TAG, Commit, File, HubError, Repository

REPOSITORY = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>dataset|space)s/)?(?P<name>[^/]+/[^/]+?)"
LARGE = re.compile(r".*\.(safetensors|bin|pt|pth|npz|gz|onnx|arrow|parquet|model)")
LARGEST_REGULAR_FILE = 10 * 2**20
SOME_TIME = "2026-01-01T00:00:00.000Z"


@dataclass
class Reply:
    """An answer: bytes as they are, anything else as JSON."""

    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


@dataclass
class Request:
    """What was asked, and by whom; kind, name, revision and path are those in the URL."""

    hub: Any
    method: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    token: Any
    kind: str = "model"
    name: str = ""
    revision: str = "main"
    path: str = ""

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    @property
    def commit(self) -> Commit:
        return self.repository.find(self.revision)

    @property
    def repository(self) -> Repository:
        return self.hub.repository(self.name, self.kind)

    def check_may_read(self) -> None:
        """Deny a private repository to strangers."""
        if self.repository.private and not (self.token and self.token.may_read(self.name)):
            raise HubError(404, "Repository not found", "RepoNotFound")

    def check_may_write(self, name: str, proposal: bool = False) -> None:
        """Refuse who may not write to this repository; a proposal (pull request) needs any token that writes."""
        if self.token is None:
            # About a repository, the client takes every anonymous 401 of the real Hub for RepositoryNotFoundError;
            # at an address without TLS it does so only with this code.
            raise HubError(401, "Invalid username or password.", "RepoNotFound" if self.name else None)
        proposal = proposal or "create_pr" in self.query or self.revision.startswith(PULL_REQUEST)
        if not (self.token.role != "read" if proposal else self.token.may_write(name)):
            raise HubError(403, f"Forbidden: you need a token that may write to {name}")


ROUTES: list[tuple[str, re.Pattern, Callable[[Request], Any], bool]] = []


def route(method: str, pattern: str, writes: bool = False):
    """Register an endpoint; one that writes is only for those who may write to the repository in its URL."""

    def register(function):
        ROUTES.append((method, re.compile(pattern), function, writes))
        return function

    return register


def answer(request: Request, path: str) -> Reply:
    """Reply of the endpoint that has this path. Raises HubError."""
    for method, pattern, function, writes in ROUTES:
        found = pattern.fullmatch(path)
        if found and method == ("GET" if request.method == "HEAD" else request.method):
            request.__dict__.update({key: unquote(value) for key, value in found.groupdict().items() if value})
            if request.name:
                request.check_may_read()
            if writes:
                request.check_may_write(request.name)
            reply = function(request)
            return reply if isinstance(reply, Reply) else Reply(reply)
    raise HubError(404, f"No endpoint {request.method} {path}")


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(request):
    token = request.token
    if token is None:
        raise HubError(401, "Invalid username or password.")
    access = {"displayName": token.role, "role": token.role, "createdAt": SOME_TIME}
    if token.role == "fineGrained":
        scoped = [{"entity": entity(name), "permissions": permissions} for name, permissions in token.scopes.items()]
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in token.organizations]
    user = {"type": "user", "id": token.user, "name": token.user, "fullname": token.user, "orgs": organizations}
    return user | {"auth": {"type": "access_token", "accessToken": access}}


def entity(name: str) -> dict:
    return {"_id": name, "type": "model" if "/" in name else "user", "name": name}


@route("POST", "/api/validate-yaml")
def validate_yaml(request):
    errors = card_errors(request.json["content"])
    if not errors:
        return {"errors": [], "warnings": []}
    if request.headers["Accept"] == "text/plain":
        return Reply("\n".join(f"- Error: {error}" for error in errors).encode(), {"Content-Type": "text/plain"}, 400)
    raise HubError(400, "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])


@route("POST", "/api/repos/create")
def create_repository(request):
    kind, name = named_in_body(request)
    request.check_may_write(name)
    url = f"{request.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in request.hub.repositories:
        raise HubError(409, f"You already created this {kind} repo", url=url)
    request.hub.repositories[kind, name] = Repository(private=request.json.get("visibility") == "private")
    return {"url": url, "name": name, "id": name}


@route("DELETE", "/api/repos/delete")
def delete_repository(request):
    request.kind, request.name = named_in_body(request)
    request.check_may_read()
    request.check_may_write(request.name)
    del request.hub.repositories[request.kind, request.name]
    return {}


def named_in_body(request) -> tuple[str, str]:
    owner = request.json.get("organization") or (request.token and request.token.user)
    return request.json.get("type") or "model", f"{owner}/{request.json['name']}"


@route("GET", REPOSITORY + "/auth-check")
@route("GET", REPOSITORY + "/auth-check/write", writes=True)
def check_access(request):
    return {}


# Uploads


@route("POST", REPOSITORY + "/preupload/(?P<revision>.+)", writes=True)
def preupload(request):
    present = request.commit.files
    return {"files": [upload_mode(file, present.get(file["path"])) for file in request.json["files"]]}


def upload_mode(new: dict, present: File | None) -> dict:
    large = LARGE.fullmatch(new["path"]) or new["size"] > LARGEST_REGULAR_FILE
    mode = {"path": new["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    return mode | ({"oid": present.etag} if present else {})


@route("POST", PAGE + r"\.git/info/lfs/objects/batch")
def lfs_batch(request):
    request.check_may_write(request.name, proposal=True)  # the request does not tell what it is for
    return {"transfer": "basic", "objects": [lfs_object(request.hub, item) for item in request.json["objects"]]}


def lfs_object(hub, item: dict) -> dict:
    if item["oid"] in hub.large_files:
        return item
    upload, verify = {"href": f"{hub.endpoint}/lfs/{item['oid']}"}, {"href": f"{hub.endpoint}/lfs/verify"}
    return item | {"actions": {"upload": upload, "verify": verify}}


@route("PUT", "/lfs/(?P<path>[0-9a-f]+)")
def lfs_upload(request):
    if hashlib.sha256(request.body).hexdigest() != request.path:
        raise HubError(400, "The content does not have this sha256")
    request.hub.large_files.uploaded[request.path] = request.body
    return b""


@route("POST", "/lfs/verify")
def lfs_verify(request):
    if request.json["oid"] not in request.hub.large_files:
        raise HubError(404, "Object does not exist")
    return {}


@route("GET", REPOSITORY + "/xet-write-token/(?P<revision>.+)", writes=True)
@route("GET", REPOSITORY + "/xet-read-token/(?P<revision>.+)")
def xet_token(request):
    url, expiration = request.hub.large_files.xet_url, int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "any", "X-Xet-Token-Expiration": str(expiration)}
    return Reply({"casUrl": url, "accessToken": "any", "exp": expiration}, headers)


@route("POST", REPOSITORY + "/commit/(?P<revision>.+)", writes=True)
def commit(request):
    header, *lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    operations = [operation(line["key"], line["value"], request.hub.large_files) for line in lines]
    title, parent = header["value"]["summary"], header["value"].get("parentCommit")
    page, pull_request_url = f"{request.hub.endpoint}/{request.name}", None
    if "create_pr" in request.query:
        start = parent or request.revision
        request.revision = request.repository.open_pull_request(title, start)
        pull_request_url = f"{page}/discussions/{len(request.repository.pull_requests)}"
    oid = request.repository.commit(request.revision, title, operations, parent)
    return {"commitOid": oid, "commitUrl": f"{page}/commit/{oid}", "pullRequestUrl": pull_request_url}


def operation(key: str, value: dict, large_files) -> tuple[str, File | None]:
    """(path, new file) of a line of a commit; no file deletes the path."""
    if key == "file":
        content = base64.b64decode(value["content"])
        return value["path"], File(len(content), content)
    if key == "lfsFile":
        if value["oid"] not in large_files:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        return value["path"], File(value["size"], sha256=value["oid"])
    return value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""), None


# Pull requests, branches, tags


@route("POST", REPOSITORY + "/discussions")
def open_pull_request(request):
    request.check_may_write(request.name, proposal=True)
    request.repository.open_pull_request(request.json["title"])
    return {"num": len(request.repository.pull_requests)}


@route("GET", REPOSITORY + "/discussions/(?P<path>[0-9]+)")
def pull_request(request):
    title = request.repository.pull_requests[int(request.path) - 1]
    request_itself = {"num": int(request.path), "title": title, "isPullRequest": True, "status": "draft"}
    where = {"repo": {"name": request.name, "type": request.kind}, "changes": {"base": f"{BRANCH}main"}}
    return request_itself | where | {"createdAt": SOME_TIME, "events": [], "filesWithConflicts": []}


@route("POST", REPOSITORY + "/branch/(?P<path>.+)", writes=True)
def create_branch(request):
    return request.repository.refer(BRANCH + request.path, request.json.get("startingPoint") or "main")


@route("POST", REPOSITORY + "/tag/(?P<revision>.+)", writes=True)
def create_tag(request):
    return request.repository.refer(TAG + request.json["tag"], request.revision)


@route("GET", REPOSITORY + "/refs")
def references(request):
    found = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    kinds = {BRANCH: "branches", TAG: "tags", PULL_REQUEST: "pullRequests"}
    for reference, oid in request.repository.refs.items():
        prefix = next(prefix for prefix in kinds if reference.startswith(prefix))
        name = reference if prefix == PULL_REQUEST else reference.removeprefix(prefix)
        found[kinds[prefix]].append({"name": name, "ref": reference, "targetCommit": oid})
    return found


# Reading


@route("GET", REPOSITORY + "(/revision/(?P<revision>.+))?")
def information(request):
    found, metadata = request.commit, metadata_of(request.commit)
    repository = {"_id": request.name, "id": request.name, "author": request.name.split("/")[0]}
    state = {"private": request.repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    dates = {"sha": found.oid, "createdAt": SOME_TIME, "lastModified": SOME_TIME}
    card = {"cardData": metadata, "tags": metadata.get("tags") or []}
    return repository | state | dates | card | {"siblings": files_of(request)}


def metadata_of(found: Commit) -> dict:
    card = found.files.get("README.md")
    try:
        return (card and card_metadata(card.content.decode())) or {}
    except yaml.YAMLError:
        return {}


def files_of(request) -> list[dict]:
    """What the Hub tells of each file of a commit."""
    return [entry_of(path, file, request.hub.large_files) for path, file in sorted(request.commit.files.items())]


def entry_of(path: str, file: File, large_files) -> dict:
    entry = {"type": "file", "path": path, "rfilename": path, "oid": file.oid, "blobId": file.oid, "size": file.size}
    if file.sha256 is None:
        return entry
    lfs = {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": len(file.blob)}
    return entry | {"lfs": lfs, "xetHash": large_files.xet_hash(file.sha256)}


@route("GET", REPOSITORY + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
def tree(request):
    files, prefix = files_of(request), request.path and f"{request.path}/"
    folders = {entry["path"][: slash.start()] for entry in files for slash in re.finditer("/", entry["path"])}
    entries = files + [{"type": "directory", "path": folder, "oid": folder, "size": 0} for folder in sorted(folders)]
    entries = [entry for entry in entries if entry["path"].startswith(prefix)]
    if not entries:
        raise HubError(404, f"{request.path} does not exist on {request.revision}", "EntryNotFound")
    if request.query.get("recursive", [""])[0].lower() == "true":
        return entries
    return [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]


@route("POST", REPOSITORY + "/paths-info/(?P<revision>.+)")
def paths_info(request):
    wanted = parse_qs(request.body.decode())["paths"]
    return [entry for entry in files_of(request) if entry["path"] in wanted]


@route("GET", PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request):
    found = request.commit
    file = found.files.get(request.path)
    headers = {"X-Repo-Commit": found.oid, "Accept-Ranges": "bytes"}
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{file.etag}"'
    if file.sha256:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        headers |= xet_headers(request, found.oid, file)
    if request.method == "HEAD":
        return Reply(b"", headers | {"Content-Length": str(file.size)})
    return part_of(request.hub.read(file), request.headers["Range"], headers)


def xet_headers(request, oid: str, file: File) -> dict[str, str]:
    xet_hash = request.hub.large_files.xet_hash(file.sha256)
    refresh = f"{request.hub.endpoint}/api/{request.kind}s/{request.name}/xet-read-token/{oid}"
    return {"X-Xet-Hash": xet_hash, "Link": f'<{refresh}>; rel="xet-auth"'} if xet_hash else {}


def part_of(content: bytes, wanted: str | None, headers: dict[str, str]) -> Reply:
    """The content, or of it the bytes that a Range header asks for."""
    if wanted is None:
        return Reply(content, headers)
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
    start = int(first) if first else len(content) - int(last)
    part = content[start : int(last) + 1 if first and last else None]
    if not part:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    return Reply(part, headers | {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}, 206)
