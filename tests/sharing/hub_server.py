"""A Hugging Face Hub on loopback for the tests, to which the real huggingface_hub and transformers speak.

    with HubServer() as hub:  # HubServer(xet=True): large files travel by hf_xet instead of LFS
        subprocess.run([...], env=os.environ | hub.environment(home=tmp_path))
        hub.files("tester/model")["config.json"]

    with HubServer() as hub:
        hub.use_here(monkeypatch, home=tmp_path)  # in this process; not needed for HfApi(hub.endpoint, token=WRITE)
        model.push_to_hub("tester/model")

    hub.fail(times=2, method="PUT", status=500)  # the next two uploads of large files fail, then all is well again

Who may do what is in TOKENS. One difference on purpose: an anonymous reader of a private repository gets 404 here, as
a stranger does, where the Hub says 401; the client raises RepositoryNotFoundError for both.
"""

import json
import re
import socket
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from hub_endpoints import Reply, Request, answer
from hub_storage import File, HubError, LargeFiles, Repository


@dataclass(frozen=True)
class Token:
    """Who speaks and what for. A fine-grained token has permissions for each entity: a namespace or a repository."""

    user: str
    role: str = "write"
    organizations: tuple[str, ...] = ()
    scopes: dict[str, list[str]] = field(default_factory=dict)

    def may_read(self, repository: str) -> bool:
        return repository.split("/")[0] in (self.user, *self.organizations)

    def may_write(self, repository: str) -> bool:
        if self.role == "fineGrained":
            return any("repo.write" in self.scopes.get(name, ()) for name in (repository, repository.split("/")[0]))
        return self.role == "write" and self.may_read(repository)


WRITE, READ, STRANGER, FINE_GRAINED = "hf_write", "hf_read", "hf_stranger", "hf_finegrained"
TOKENS = {
    WRITE: Token("tester", organizations=("laboratory",)),
    READ: Token("tester", "read", organizations=("laboratory",)),
    STRANGER: Token("stranger"),
    FINE_GRAINED: Token("tester", "fineGrained", scopes={"tester/allowed": ["repo.content.read", "repo.write"]}),
}


@dataclass
class Fault:
    """What the next `times` requests meet whose method is this and in whose path this regex is found.

    They get `status`; or the connection breaks after `cut_after` bytes of what they send (of the answer, if they send
    nothing); or, with `lose_reply`, they are carried out and the connection breaks before the answer.
    """

    times: int = 1
    method: str | None = None
    path: str = ""
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    lose_reply: bool = False

    def strikes(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and re.search(self.path, path) is not None


class Record(NamedTuple):
    """A request that came, and the status it was answered: None where the connection was broken."""

    method: str
    path: str
    status: int | None


class HubServer:
    """The server; see the module's docstring. `requests` lists what was asked of it."""

    def __init__(self, xet: bool = False):
        self.xet = xet
        self.repositories: dict[tuple[str, str], Repository] = {}  # by kind ("model") and name
        self.requests: list[Record] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self.folder = tempfile.TemporaryDirectory(prefix="hub-")
        self.large_files = LargeFiles(Path(self.folder.name) / "xet-store")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.folder.cleanup()

    def environment(self, token: str | None = WRITE, home: str | Path | None = None) -> dict[str, str]:
        """Variables for a process that shall use this server: huggingface_hub reads them when it is imported."""
        home = Path(home or self.folder.name) / "hf-home"
        variables = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token or "", "HF_HOME": str(home)}
        caches = {"HF_HUB_CACHE": str(home / "hub"), "HF_XET_CACHE": str(home / "xet")}
        switches = {"HF_HUB_DISABLE_XET": "0" if self.xet else "1", "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return variables | caches | switches | quiet

    def use_here(self, monkeypatch, token: str | None = WRITE, home: str | Path | None = None) -> None:
        """Let huggingface_hub and transformers, imported before, use this server until the test ends."""
        from huggingface_hub import constants, hf_api
        from transformers.utils import hub as transformers_hub

        variables = self.environment(token, home)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        constants_here = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": variables["HF_HUB_CACHE"],
            "HF_HUB_DISABLE_XET": not self.xet,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in constants_here.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)  # behind huggingface_hub.create_repo and the like
        monkeypatch.setattr(transformers_hub, "_hf_api", None)

    def fail(self, **fault) -> None:
        """Let the next requests meet this Fault; several are met in the order in which they were announced."""
        self.faults.append(Fault(**fault))

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.strikes(method, path)), Fault())
            fault.times -= 1
            return fault

    def token(self, authorization: str | None) -> Token | None:
        """The token of an Authorization header, None for who comes without."""
        if authorization is None:
            return None
        if authorization.removeprefix("Bearer ") not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS[authorization.removeprefix("Bearer ")]

    def repository(self, name: str, kind: str = "model") -> Repository:
        if (kind, name) not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Contents of a repository by path, large ones included."""
        files = self.repository(name, kind).find(revision).files
        return {path: self.read(file) for path, file in files.items()}

    def read(self, file: File) -> bytes:
        return self.large_files.read(file) if file.content is None else file.content


class Handler(BaseHTTPRequestHandler):
    """Reads a request, meets the faults, and sends what the endpoints answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: the second would wait for the first's receipt

    def log_message(self, *arguments) -> None:
        """Nothing: `requests` is the log."""

    def do_GET(self) -> None:
        fault = self.hub.next_fault(self.command, self.path)
        length = int(self.headers["Content-Length"] or 0)
        if fault.cut_after is not None and length:
            self.rfile.read(min(length, fault.cut_after))
            return self.break_connection()
        body = self.rfile.read(length)
        error = Reply({"error": f"Fault {fault.status}"}, fault.headers, fault.status)
        reply = error if fault.status else self.answer(body)
        if fault.lose_reply:
            return self.break_connection()
        self.send(reply, fault.cut_after)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def answer(self, body: bytes) -> Reply:
        url = urlsplit(self.path)
        try:
            token = self.hub.token(self.headers["Authorization"])
            with self.hub.lock:
                query = parse_qs(url.query)
                return answer(Request(self.hub, self.command, query, self.headers, body, token), url.path)
        except HubError as error:
            return Reply(error.body, error.headers, error.status)

    def send(self, reply: Reply, cut_after: int | None) -> None:
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | reply.headers
        if cut_after is None:
            self.record(reply.status)  # before the client can ask for it
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut_after])
        if cut_after is not None:
            self.break_connection()

    def break_connection(self) -> None:
        self.record(None)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def record(self, status: int | None) -> None:
        self.hub.requests.append(Record(self.command, self.path, status))
