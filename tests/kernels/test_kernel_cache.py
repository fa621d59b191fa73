"""The compiled kernel is kept under a name that changes with any of its sources."""

import shutil

import pytest

from hf_compressm.kernels import cpp_scan

FILES = sorted(path.name for path in cpp_scan.SOURCES.iterdir())


def test_the_kernel_has_one_source_that_includes_the_others():
    included = [
        line.split('"')[1]
        for path in cpp_scan.SOURCES.iterdir()
        for line in path.read_text().splitlines()
        if line.startswith('#include "')
    ]
    assert cpp_scan.SOURCE.name == "scan.cpp"
    assert set(included) == set(FILES) - {"scan.cpp"}


@pytest.mark.parametrize("name", FILES)
def test_a_change_of_any_source_makes_another_kernel(name, tmp_path, monkeypatch):
    before = cpp_scan._library()
    copies = shutil.copytree(cpp_scan.SOURCES, tmp_path / "cpp")
    monkeypatch.setattr(cpp_scan, "SOURCES", copies)
    assert cpp_scan._library() == before
    (copies / name).write_text((copies / name).read_text() + "// another line\n")
    assert cpp_scan._library() != before
