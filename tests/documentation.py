"""The README and the pages of docs/, taken apart: fenced blocks, console lines, calls in the text, links."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "bash", "text", "bibtex")  # `text` is what the console line before it prints
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMANDS = ("hf-compressm ", "python scripts/", "accelerate launch ")  # what a console line in the text starts with
CALLS = ("CompreSSMConfig(", "CompreSSMSchedule(")


class Block(NamedTuple):
    """A fenced block of a page, and the line of the page that its first line is."""

    page: Path
    line: int
    language: str
    text: str


class ConsoleLine(NamedTuple):
    """One command, and what the page says that it prints, where it says so."""

    where: str
    words: list[str]
    output: str = ""


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in FENCE.finditer(text)]


def lines_of(block: Block, output: str = "") -> list[ConsoleLine]:
    """The commands of a console block; the output belongs to the last one."""
    joined = block.text.replace("\\\n", " ")
    commands = [command for line in joined.splitlines() for command in _commands_in(line)]
    outputs = [""] * (len(commands) - 1) + [output]
    where = f"{block.page.name}:{block.line}"
    return [ConsoleLine(where, words, printed) for words, printed in zip(commands, outputs, strict=True)]


def _commands_in(line: str) -> Iterator[list[str]]:
    for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        if words:
            yield words


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def inline_lines_of(page: Path) -> list[ConsoleLine]:
    """Console lines within the text that have an argument, such as `hf-compressm env`."""
    codes = [code for code in INLINE.findall(prose_of(page)) if code.startswith(COMMANDS) and "..." not in code]
    return [ConsoleLine(f"{page.name}, in the text", shlex.split(code)) for code in codes]


def inline_calls_of(page: Path) -> list[str]:
    """Configurations and schedules within the text that are written out."""
    return [code for code in INLINE.findall(prose_of(page)) if code.startswith(CALLS) and "..." not in code]


def links_of(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each link of a page to a file of the repository."""
    links = [link for link in LINK.findall(prose_of(page)) if "://" not in link]
    parts = [link.partition("#") for link in links]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
