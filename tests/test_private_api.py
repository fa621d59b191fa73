"""Every private name of another package is in the table, and every name of the table is there.

The second test reads the sources. It sees imports, attributes, overridden methods and names in strings. It cannot see
an attribute without an underscore that is undocumented all the same (those of DistributedDataParallel, say), a name
that is put together while the program runs, or a foreign name that a definition in the same file has, too.
"""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from hf_compressm import private_api
from hf_compressm.private_api import PRIVATE_NAMES, TESTED, check_private_names, is_tested, missing_private_names

PACKAGE = ROOT / "hf_compressm"
LISTED = {row.name for row in PRIVATE_NAMES}
LISTED_PATHS = {str(row) for row in PRIVATE_NAMES}

# Modules below the top of these packages whose names have no page in their documentation.
WATCHED = ("transformers", "accelerate", "huggingface_hub", "datasets")
DOCUMENTED = (
    "transformers.modeling_outputs",
    "accelerate.utils",
    "datasets.exceptions",
    "huggingface_hub.dataclasses",
    "huggingface_hub.errors",
)
DOCUMENTED_NAMES = {"transformers.utils.logging"}
# Folders, endings of keys and of operators of our own; "_hooks" ends names of torch.nn.Module, which are listed whole.
OUR_STRINGS = {"_rollback", "_cut", "_scan", "_scan_backward", "_hooks"}
OUR_STRINGS |= {"_scalar_decay_scan", "_scalar_decay_scan_backward"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


@pytest.mark.parametrize("row", PRIVATE_NAMES, ids=str)
def test_what_is_installed_has_every_name_of_the_table(row):
    assert row.name in str(row) and row.purpose.endswith(".") and row.seen_in
    assert row not in missing_private_names(row.owner)


def private_names_of(tree: ast.AST) -> set[str]:
    """Foreign private names in a file: those that it uses and does not define, and those that others call."""
    used, through_super = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                through_super.add(name)
            case ast.Attribute(value=ast.Name(id=module)) if module in sys.stdlib_module_names:
                pass  # such as argparse._ArgumentGroup, which has no public name to annotate with
            case ast.Attribute(attr=name) | ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
    of_classes = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in members(node)}
    names = (used - defined_in(tree)) | through_super | (of_classes - used)
    return {name for name in names if is_private(name)}


def defined_in(tree: ast.AST) -> set[str]:
    """Functions, classes, variables and attributes of `self`."""
    defined = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                defined.add(name)
    return defined


def members(node: ast.ClassDef) -> set[str]:
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    values = [part for part in node.body if isinstance(part, ast.Assign)]
    return methods | {target.id for part in values for target in part.targets if isinstance(target, ast.Name)}


def private_strings_of(tree: ast.AST) -> set[str]:
    """Names in strings, as `getattr` and tables of names have them."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    parts = {part for text in strings if re.fullmatch(r"[\w.]+", text) for part in text.split(".")}
    return {part for part in parts if is_private(part)} - OUR_STRINGS - defined_in(tree)


def undocumented_imports_of(tree: ast.AST) -> set[str]:
    """Paths of what is imported from private modules, or from undocumented ones of the watched packages."""
    paths = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            paths |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            paths |= {alias.name for alias in node.names}
    return {path for path in paths if any(map(is_private, path.split("."))) or is_undocumented(path)}


def is_undocumented(path: str) -> bool:
    module, _, _ = path.rpartition(".")
    is_inner = module.startswith(tuple(f"{package}." for package in WATCHED))
    return is_inner and module not in DOCUMENTED and path not in DOCUMENTED_NAMES


def unlisted(source: str) -> set[str]:
    tree = ast.parse(source)
    names = {name for name in private_names_of(tree) | private_strings_of(tree) if name not in LISTED}
    modules = {row.owner for row in PRIVATE_NAMES}
    return names | {path for path in undocumented_imports_of(tree) if path not in LISTED_PATHS | modules}


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "private_api.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_private_name_that_is_used_is_in_the_table(path: Path):
    assert not unlisted(path.read_text())


def test_every_name_of_the_table_is_used():
    text = "\n".join(path.read_text() for path in SOURCES)
    words = set(re.findall(r"\w+", text))
    assert {name for name in LISTED if name not in words and not name.endswith("_hooks")} == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("model._tied_weights_keys", "_tied_weights_keys"),
        ("self._inner_training_loop()", "_inner_training_loop"),
        ("class Ours(Trainer):\n    def _save_checkpoint(self): ...", "_save_checkpoint"),
        ("class Ours(Model):\n    _tied_weights_keys = ()", "_tied_weights_keys"),
        ("class Ours(Trainer):\n    def _wrap(self): super()._wrap()\n    def other(self): self._wrap()", "_wrap"),
        ("getattr(model, '_tp_plan', None)", "_tp_plan"),
        ("from torch.distributed._tensor import api", "torch.distributed._tensor.api"),
        ("from transformers.trainer import PREFIX", "transformers.trainer.PREFIX"),
        ("from accelerate.utils.dataclasses import Plugin", "accelerate.utils.dataclasses.Plugin"),
    ],
)
def test_a_name_that_is_not_listed_is_seen(source, name):
    assert unlisted(source) == {name}


@pytest.mark.parametrize(
    "source",
    [
        "def _own(): ...\n_own()",
        "import argparse\ndef add(group: argparse._ArgumentGroup): ...",
        "class A:\n    def __init__(self): self._x = 1\n    def y(self): return self._x",
        "class _Own:\n    def copy(self) -> '_Own': ...",
        "from transformers.utils import logging",
        "from ..kernels import _own",
    ],
)
def test_names_of_our_own_are_not_taken_for_foreign_ones(source):
    assert not unlisted(source)


def test_a_name_that_is_gone_is_refused_with_the_remedy(monkeypatch):
    gone = private_api.PrivateName("torch.nn.Linear", "_gone_since", "It serves nothing.")
    elsewhere = private_api.PrivateName("torch.gone", "_anything", "It serves nothing.")
    monkeypatch.setattr(private_api, "PRIVATE_NAMES", (*PRIVATE_NAMES, gone, elsewhere))
    assert missing_private_names("torch.nn.Linear") == [gone] and missing_private_names("torch.gone") == [elsewhere]
    with pytest.raises(
        ValueError, match=r"no torch\.nn\.Linear\._gone_since.*The tests passed with 2\.13.*pip install"
    ):
        check_private_names("torch.nn.Linear")


def test_a_release_that_was_not_tested_is_told_once(monkeypatch, caplog):
    assert is_tested("transformers")
    check_private_names.cache_clear()
    check_private_names("transformers.Trainer")
    assert not caplog.records
    check_private_names.cache_clear()
    monkeypatch.setitem(TESTED, "transformers", ("5.1", "5.2"))
    for _ in range(2):
        check_private_names("transformers.Trainer")
    (record,) = caplog.records
    assert re.search(r"not tested with transformers \d.*The tests passed with 5\.1, 5\.2\. Install", record.message)
    check_private_names.cache_clear()


def test_setup_cfg_admits_the_tested_releases_and_no_later_transformers():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = config["options"]["install_requires"].split()
    major, minor = map(int, TESTED["transformers"][-1].split("."))
    assert any(line.startswith("transformers>=") and line.endswith(f"<{major}.{minor + 1}") for line in required)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package, releases in TESTED.items():
        assert any(pinned[package].startswith(f"{release}.") for release in releases)
