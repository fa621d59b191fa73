"""Parts of `scripts/pretrain.py`: how it reads text, as the console does, and what it says of the speed."""

from types import SimpleNamespace

import pretrain
import pytest
from transformers import AutoTokenizer

from hf_compressm.console.text import TEXT_UNITS, token_batches

WRAPPED = "In the beginning God created\nthe heaven and the earth.\n\nAnd the earth was without form,\nand void.\n\n"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("unit", TEXT_UNITS)
@pytest.mark.parametrize("streaming", [False, True])
def test_training_and_console_read_the_same_texts(models, tmp_path, unit, streaming):
    file = tmp_path / "wrapped.txt"
    file.write_text(WRAPPED * 40)
    tokenizer = AutoTokenizer.from_pretrained(models / "whole")
    (batch,) = token_batches(str(file), str(models / "whole"), 1, 1, 512, unit=unit)
    args = pretrain.DataArguments(
        train_file=str(file), validation_examples=0, block_size=512, text_unit=unit, streaming=streaming
    )
    if not streaming:
        args.validation_file = str(file)
    train, _ = pretrain.load_text(args, seed=0)
    first = next(iter(pretrain.tokenized(train, tokenizer, args)))["input_ids"]
    assert first == batch["input_ids"][0].tolist()
    lines = tokenizer.decode(first).split("<end>")
    assert lines[0] == ("In the beginning God created" + "\nthe heaven and the earth." * (unit == "paragraph"))


def test_the_default_unit_is_the_same(models, tmp_path):
    file = tmp_path / "wrapped.txt"
    file.write_text(WRAPPED * 40)
    (batch,) = token_batches(str(file), str(models / "whole"), 1, 1, 64)
    args = pretrain.DataArguments(train_file=str(file), validation_file=str(file), block_size=64)
    blocks = pretrain.tokenized(pretrain.load_text(args, 0)[0], AutoTokenizer.from_pretrained(models / "whole"), args)
    assert blocks[0]["input_ids"] == batch["input_ids"][0].tolist()


def test_too_few_texts_to_set_some_aside_are_refused(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("one\ntwo\nthree\n")
    with pytest.raises(ValueError, match=r"hold 1 texts, and validation_examples = 2 .* --text_unit line"):
        pretrain.load_text(pretrain.DataArguments(train_file=str(file), validation_examples=2), seed=0)
    parts = pretrain.load_text(
        pretrain.DataArguments(train_file=str(file), validation_examples=2, text_unit="line"), seed=0
    )
    assert [len(part) for part in parts] == [1, 2]


def test_a_run_that_took_no_step_says_so():
    throughput = pretrain.ThroughputCallback(1024)
    assert str(throughput) == "  no step was taken, since the run was at its end already"
    logs, state = {"loss": 1.0}, SimpleNamespace(log_history=[{}])
    throughput.on_log(None, state, None, logs=logs)
    assert logs == {"loss": 1.0} and throughput.rates() == {}
    throughput.seconds["64"] += [0.5, 0.25, 1.0]
    assert str(throughput) == "  N =  64:    2,048 tokens per second (1.00×)"
