"""What the Hub of the tests keeps: repositories with their commits and references, and the bytes of large files."""

import hashlib
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

BRANCH, TAG, PULL_REQUEST = "refs/heads/", "refs/tags/", "refs/pr/"


class HubError(Exception):
    """A refusal: the status, the Hub's name of the error, and what else its headers and body say."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message} | body
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes, or, if it is large, the sha256 under which LargeFiles has them."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def blob(self) -> bytes:
        """What git stores, which for a large file is a pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return pointer.encode() if self.content is None else self.content

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()

    @property
    def etag(self) -> str:
        """The name by which the client recognises the content."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of its tree."""

    oid: str
    title: str
    files: dict[str, File]


class Repository:
    """Commits and the references (branches, tags, pull requests) to them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.pull_requests: list[str] = []  # their titles
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.refs = {
            f"{BRANCH}main": self._add("initial commit", {".gitattributes": File(len(attributes), attributes)})
        }

    def _add(self, title: str, files: dict[str, File]) -> str:
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files)
        return oid

    def reference(self, revision: str) -> str | None:
        """Full name of the reference that a revision means, if it is one."""
        return next((name for name in (BRANCH + revision, TAG + revision, revision) if name in self.refs), None)

    def find(self, revision: str) -> Commit:
        """Commit of a branch, a tag, a pull request, or an oid (its first seven digits are enough)."""
        reference = self.reference(revision)
        if reference:
            return self.commits[self.refs[reference]]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def refer(self, reference: str, revision: str) -> None:
        """Make a new branch or tag."""
        if reference in self.refs:
            raise HubError(409, "Reference already exists")
        self.refs[reference] = self.find(revision).oid

    def open_pull_request(self, title: str, start: str = "main") -> str:
        """Reference of a new pull request."""
        self.pull_requests.append(title)
        reference = f"{PULL_REQUEST}{len(self.pull_requests)}"
        self.refer(reference, start)
        return reference

    def commit(self, revision: str, title: str, operations: list[tuple], parent: str | None = None) -> str:
        """Put a commit on a branch or a pull request; its oid. A parent that is not the head is a conflict."""
        head, reference = self.find(revision), self.reference(revision)
        if reference is None or reference.startswith(TAG):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if parent and not head.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for path, file in operations:
            if file is None:
                delete(path, files)
            else:
                files[path] = file
        self.refs[reference] = self._add(title, files)
        return self.refs[reference]


def delete(path: str, files: dict[str, File]) -> None:
    """Take a file, or a folder (its path ends with /), out of a tree."""
    gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
    if not gone:
        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    for name in gone:
        del files[name]


class LargeFiles:
    """Bytes of large files by sha256: sent by LFS they lie here, by xet in the store that the client itself fills."""

    def __init__(self, xet_store: Path):
        self.uploaded: dict[str, bytes] = {}
        self.xet_store = xet_store
        self.xet_url = f"local://{xet_store}"  # hf_xet takes this in place of a server's address

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self.uploaded or self.xet_hash(sha256) is not None

    def read(self, file: File) -> bytes:
        if file.sha256 in self.uploaded:
            return self.uploaded[file.sha256]
        from hf_xet import XetFileInfo, XetSession

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "content"
            with XetSession().new_file_download_group(endpoint=self.xet_url) as group:
                group.start_download_file(XetFileInfo(self.xet_hash(file.sha256), file.size), str(path))
            return path.read_bytes()

    def xet_hash(self, sha256: str) -> str | None:
        """The name that xet has for a content, from the shards which the client wrote."""
        shards = self.xet_store.glob("xet/xorbs/shards/*.mdb")
        return next((names[sha256] for names in map(xet_names, shards) if sha256 in names), None)


def xet_names(shard: Path) -> dict[str, str]:
    """Xet hashes of the files that a shard describes, by their sha256.

    After a header of 48 bytes come records of 48 bytes. A file is a record with its hash, flags and number of
    segments, then the segments (twice, if they have verification hashes), then one record with the sha256.
    """
    content, start, names = shard.read_bytes(), 48, {}
    while content[start : start + 32] != b"\xff" * 32:
        flags, segments = struct.unpack("<II", content[start + 32 : start + 40])
        end = start + 48 + 48 * segments * (2 if flags & 0x80000000 else 1)
        if flags & 0x40000000:  # it has a sha256
            names[xet_digits(content[end : end + 32])] = xet_digits(content[start : start + 32])
            end += 48
        start = end
    return names


def xet_digits(digest: bytes) -> str:
    """Xet prints a hash as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
