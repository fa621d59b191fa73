"""This module reads text for training and calibration, and makes the batches of tokens that the console needs."""

import codecs
import glob
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowInvalid
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PLAIN = (".txt", ".json", ".jsonl")
CHUNK, STREAM_HEAD = 2**20, 2**26  # bytes; of a stream no more than its head is checked
TEXT_UNITS = ("paragraph", "line")
TEXT_UNIT_HELP = "What is one text in a .txt file: a 'paragraph', which a blank line ends, or a 'line'."


def load_text_files(files: dict[str, str], unit: str = "paragraph", streaming: bool = False):
    """Read local files as data sets.

    Args:
        files: split → .txt, .json, .jsonl or .parquet file, all of one kind.
        unit: what is one text in a .txt file, "paragraph" or "line".
        streaming: whether to read as a stream, without a copy on disk.

    Returns:
        Split → data set, as of `datasets.load_dataset`; that of a .txt file has the column "text".

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file or the unit is of an unknown kind, the files are of several kinds, one is not UTF-8, or the
            path of one cannot be said to `datasets`.
    """
    if unit not in TEXT_UNITS:
        raise ValueError(f"text_unit = {unit!r}; allowed: one of {', '.join(TEXT_UNITS)}.")
    formats = {FORMATS.get(Path(file).suffix) for file in files.values()}
    if len(formats) > 1 or None in formats:
        raise ValueError(
            f"the files {list(files.values())} are not all of one known kind; allowed: one of {', '.join(FORMATS)}."
        )
    for file in files.values():
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is not a file.")
        if Path(file).suffix in PLAIN:
            check_encoding(file, STREAM_HEAD if streaming else None)
    (kind,) = formats
    options = {"sample_by": unit} if kind == "text" else {}
    patterns = {split: _pattern_of(file) for split, file in files.items()}
    return load_dataset(kind, data_files=patterns, streaming=streaming, **options)


def _pattern_of(file: str) -> str:
    """Return the pattern by which `datasets` finds this file and no other.

    Raises:
        ValueError: there is none: `datasets` takes `::` for a chain of archives, and fills in environment variables.
    """
    path = str(Path(file).parent.resolve() / Path(file).name)
    if "::" in path or os.path.expandvars(path) != path:
        raise ValueError(
            f"{path} cannot be read under this name, in which datasets takes '::' for an archive and '$NAME' for an "
            "environment variable: rename it."
        )
    return glob.escape(path)


def check_encoding(file: str, limit: int | None = None) -> None:
    """Refuse a file that is not UTF-8.

    Args:
        file: the file.
        limit: how many bytes are read, to whole MiB; None for all.

    Raises:
        ValueError: a byte does not fit; the message says which, and how to convert the file.
    """
    decoder, position, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with open(file, "rb") as source:
        while limit is None or position < limit:
            chunk = source.read(CHUNK)
            waiting, _ = decoder.getstate()  # the first bytes of a character that the last chunk cut
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                start = position - len(waiting) + error.start
                line += error.object[: error.start].count(b"\n")
                raise ValueError(
                    f"{file} is not UTF-8: byte {start:,} (line {line:,}) is 0x{error.object[error.start]:02x}. "
                    f"Convert it from its encoding, say by: iconv -f WINDOWS-1252 -t UTF-8 {file} -o utf8.txt"
                ) from error
            if not chunk:
                break
            position, line = position + len(chunk), line + chunk.count(b"\n")


def token_batches(
    text: str,
    tokenizer: str,
    count: int,
    batch_size: int,
    length: int,
    column: str = "text",
    unit: str = "paragraph",
) -> list[dict[str, torch.Tensor]]:
    """Make batches of the tokens of texts that are joined by the end-of-text token.

    Args:
        text: a .txt, .json, .jsonl or .parquet file, or the name of a dataset, whose train split is streamed.
        tokenizer: folder or name of the tokenizer.
        count: the number of batches.
        batch_size: the number of sequences per batch.
        length: the number of tokens per sequence, L.
        column: the name of the column that holds the text.
        unit: what is one text in a .txt file, as for `load_text_files`.

    Returns:
        `count` batches, {"input_ids": (batch_size, length), "labels": the same}.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: there is no tokenizer or no such column, a file is damaged, not UTF-8 or of another kind, or there
            is too little text; the message says how much there is.
    """
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} = {value}; allowed: a whole number, at least 1.")
    tokens = _tokens(text, _tokenizer(tokenizer), column, unit)
    wanted = count * batch_size * length
    stream = torch.tensor(list(islice(tokens, wanted)))
    if len(stream) < wanted:
        raise ValueError(
            f"{text} holds {len(stream):,} tokens; {count} batches of {batch_size} × {length} need {wanted:,}: give "
            "more text, or shorter or fewer batches."
        )
    return [{"input_ids": batch, "labels": batch} for batch in stream.view(count, batch_size, length)]


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no tokenizer can be read from {name} ({reason}); give --tokenizer.") from error


def _tokens(text: str, tokenizer, column: str, unit: str) -> Iterator[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for example in _examples(text, unit):
        if column not in example:
            raise ValueError(f"{text} has no column '{column}'; it has {', '.join(example)}: give --text-column.")
        if not isinstance(example[column], str):
            raise ValueError(
                f"the column '{column}' of {text} holds {example[column]!r}, no text: give --text-column."
            )
        yield from chain(tokenizer(example[column], add_special_tokens=False)["input_ids"], end)


def _examples(text: str, unit: str) -> Iterator[dict]:
    try:
        yield from _dataset(text, unit)
    except UnicodeDecodeError as error:
        if Path(text).suffix in PLAIN:
            check_encoding(text)
        raise ValueError(f"{text} holds text that is not UTF-8 ({error}): write it anew, decoded rightly.") from error
    except (ArrowInvalid, DatasetsError) as error:
        raise ValueError(f"{text} is damaged ({error}); give another text.") from error


def _dataset(text: str, unit: str):
    path = Path(text)
    if path.suffix in FORMATS:
        return load_text_files({"train": text}, unit, streaming=True)["train"]
    if path.exists() or text.startswith((".", "/", "~")):
        raise ValueError(
            f"{text} cannot be read as text; allowed: {', '.join(FORMATS)} files, and names of datasets on the Hub."
        )
    return load_dataset(text, split="train", streaming=True)
