"""The file that was named is read, and no other, whatever its name would mean to `datasets` or to a shell."""

import pytest

from hf_compressm.console.text import load_text_files

# What datasets would take for a pattern, an archive or an address, and the other files that it would find.
NAMES = {
    "data[1].txt": ["data1.txt"],
    "log?.txt": ["log1.txt"],
    "a*b.txt": ["axb.txt"],
    "my [v2] text.txt": ["my v text.txt"],
    "[d]/**.txt": ["d/x.txt", "[d]/x.txt"],
    "~/x.txt": [],
    "file:x.txt": [],
    "a,b {c} $NOWHERE %20 #.txt": [],
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_was_named_is_read(tmp_path, name, streaming):
    for each in (name, *NAMES[name]):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text(f"of {each}")
    for file in (name, str(tmp_path / name)):
        texts = load_text_files({"train": file}, streaming=streaming)["train"]
        assert list(texts) == [{"text": f"of {name}"}]


def test_a_file_below_a_link_is_the_one_that_the_system_finds(tmp_path):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    for file in ("real/x.txt", "x.txt"):
        (tmp_path / file).write_text(f"of {file}")
    assert list(load_text_files({"train": "link/../x.txt"})["train"]) == [{"text": "of real/x.txt"}]


@pytest.mark.parametrize("name", ["a::b.txt", "$HOME.txt"])
def test_a_name_that_cannot_be_said_is_refused(tmp_path, name):
    (tmp_path / name).write_text("words")
    with pytest.raises(ValueError, match=r"cannot be read under this name.*rename it"):
        load_text_files({"train": name})
