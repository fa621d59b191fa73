"""Calibration text for the console commands: from a file or a dataset to batches of tokens."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowInvalid
from transformers import AutoTokenizer, PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def token_batches(
    text: str, tokenizer: str, count: int, batch_size: int, length: int, column: str = "text"
) -> list[dict[str, torch.Tensor]]:
    """`count` batches of tokens, (batch_size, length), of texts that are joined by the end-of-text token.

    Args:
        text: a .txt, .json, .jsonl or .parquet file, or the name of a dataset, whose train split is streamed.
        tokenizer: folder or name.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: no tokenizer, a file that is damaged or of another kind, no such column, or too little text; says
            how much there is.
    """
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} = {value}; allowed: a whole number, at least 1.")
    tokens = _tokens(text, _tokenizer(tokenizer), column)
    wanted = count * batch_size * length
    stream = torch.tensor(list(islice(tokens, wanted)))
    if len(stream) < wanted:
        raise ValueError(
            f"{text} holds {len(stream):,} tokens; {count} batches of {batch_size} × {length} need {wanted:,}: give "
            "more text, or shorter or fewer batches."
        )
    return [{"input_ids": batch} for batch in stream.view(count, batch_size, length)]


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no tokenizer can be read from {name} ({reason}); give --tokenizer.") from error


def _tokens(text: str, tokenizer, column: str) -> Iterator[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for example in _examples(text):
        if column not in example:
            raise ValueError(f"{text} has no column '{column}'; it has {', '.join(example)}: give --text-column.")
        if not isinstance(example[column], str):
            raise ValueError(f"{text}: the column '{column}' holds {example[column]!r}, expected text.")
        yield from chain(tokenizer(example[column], add_special_tokens=False)["input_ids"], end)


def _examples(text: str) -> Iterator[dict]:
    try:
        yield from _dataset(text)
    except (ArrowInvalid, DatasetsError) as error:
        raise ValueError(f"{text} is damaged ({error}); give another text.") from error


def _dataset(text: str):
    path = Path(text)
    if path.suffix in FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"{text} is not a file.")
        options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        return load_dataset(FORMATS[path.suffix], data_files=text, split="train", streaming=True, **options)
    if path.exists() or text.startswith((".", "/", "~")):
        raise ValueError(f"{text}: allowed are {', '.join(FORMATS)} files, and names of datasets on the Hub.")
    return load_dataset(text, split="train", streaming=True)
