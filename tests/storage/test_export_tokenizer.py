"""What goes with a model beside its weights goes with its export: its tokenizer, of whatever kind."""

import json
from fnmatch import fnmatch

import pytest
import transformers
from conftest import copy_of
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.tokenization_utils_base import ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, GENERATION_CONFIG_NAME

from hf_compressm.storage.export import CARRIED, export_bf16, export_mamba_ssm
from hf_compressm.storage.loading import NEEDED

COMMON = [
    ADDED_TOKENS_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_NAME,
]


def files_of_tokenizers() -> set[str]:
    """The names by which the tokenizer classes of Transformers know their files."""
    names = set(COMMON)
    for name in sorted(set(TOKENIZER_MAPPING_NAMES.values()) - {None}):
        try:
            names |= set(getattr(transformers, name).vocab_files_names.values())
        except (AttributeError, ImportError):  # needs a package that is not here
            continue
    return names


@pytest.mark.parametrize("patterns", [CARRIED, NEEDED], ids=["exported", "downloaded"])
def test_every_file_of_every_tokenizer_of_transformers_is_taken(patterns):
    names = files_of_tokenizers()
    assert len(names) > 15
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)} == set()


@pytest.mark.parametrize("export", [export_bf16, export_mamba_ssm])
def test_what_users_added_is_carried_over(models, tmp_path, export):
    source = copy_of(models / "uniform", tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<mine>"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    (source / "added_tokens.json").write_text(json.dumps({"<mine>": len(tokenizer) - 1}))
    others = ("spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tokenization_mine.py")
    for name in others:
        (source / name).write_text(name)
    (source / "notes.md").write_text("mine")
    target = export(source, tmp_path / "target").folder
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in (*others, "added_tokens.json"))
    again = AutoTokenizer.from_pretrained(target)
    assert "<mine>" in again.get_vocab() and again.chat_template == tokenizer.chat_template
    assert (source / CHAT_TEMPLATE_DIR / "tool.jinja").is_file() and not (target / "notes.md").exists()
