"""Files are written such that a reader never sees one half written."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file under a temporary name beside `path`, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON, aside first and then renamed."""
    write_aside(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def read_json(path: Path) -> dict:
    """Return the table that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # a folder or a loop of links in its place, too
        raise ValueError(f"{path} is truncated or damaged ({error}); take another checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no table of names and values; take another checkpoint.")
    return content


def check_new(path: Path) -> None:
    """Refuse to write a folder that exists, unless it is empty.

    Raises:
        FileExistsError: the folder exists and is not empty, or a file is in its place; the error names it.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise FileExistsError(f"{path} exists and is not an empty folder; give another.")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise FileExistsError(f"{parent} is not a folder, so {path} cannot be made; give another.")


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Make a new folder beside `path` that takes its place at the end of the block, or vanishes where that fails.

    `path` may be an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's is for the owner alone
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
