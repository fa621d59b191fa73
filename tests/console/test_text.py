"""Text that is not UTF-8 is refused: the error names the file, the place and the remedy."""

import pyarrow
import pyarrow.parquet
import pytest

from hf_compressm.console import text
from hf_compressm.console.text import _examples, check_encoding, load_text_files


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("latin.txt", "one\n\ncafé".encode("latin-1"), r"byte 8 \(line 3\) is 0xe9"),
        ("latin.jsonl", '{"text": "one"}\n{"text": "é"}\n'.encode("latin-1"), r"byte 26 \(line 2\) is 0xe9"),
        ("utf16.txt", "one".encode("utf-16"), r"byte 0 \(line 1\) is 0xff"),
        ("cut.txt", "café".encode()[:-1], r"byte 3 \(line 1\) is 0xc3"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_not_utf_8_is_refused(tmp_path, name, content, place, streaming):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8: {place}\. Convert it .* iconv"):
        load_text_files({"train": str(file)}, streaming=streaming)


def test_characters_that_lie_across_the_chunks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 2)
    file = tmp_path / "text.txt"
    file.write_text("é€🙂\n" * 3, encoding="utf-8")
    check_encoding(str(file))
    file.write_bytes(file.read_bytes() + b"a\xe9")
    with pytest.raises(ValueError, match=r"byte 31 \(line 4\) is 0xe9"):
        check_encoding(str(file))
    check_encoding(str(file), limit=20)


def test_text_that_is_not_utf_8_further_on_is_refused_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "STREAM_HEAD", 0)
    (tmp_path / "latin.txt").write_bytes("one\n\ncafé".encode("latin-1"))
    column = pyarrow.array(["café".encode("latin-1")], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "latin.parquet")
    for name, message in (("latin.txt", r"byte 8 \(line 3\) is 0xe9"), ("latin.parquet", "latin.parquet holds text")):
        with pytest.raises(ValueError, match=message):
            list(_examples(str(tmp_path / name), "paragraph"))
