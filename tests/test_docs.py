"""What the README and docs/ show works: every Python block is run, and every console line, or checked if it cannot be.

The blocks of a page run in order, in one namespace, in a folder that looks like a checkout. Names that a page calls
the reader's own come from `READERS_OWN`. A console line that needs the Hub, speaks to the local one of the tests.
"""

import configparser
import re
import shutil
import sys
from dataclasses import fields
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, build_model, build_trainer
from datasets import Dataset
from documentation import (
    LANGUAGES,
    PAGES,
    ConsoleLine,
    anchors_of,
    blocks_of,
    inline_calls_of,
    inline_lines_of,
    lines_of,
    links_of,
)
from hub_server import TOKENS, HubServer, Token
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments
from trl import SFTConfig

import hf_compressm
from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.architectures.family import Family
from hf_compressm.architectures.registry import FAMILIES
from hf_compressm.architectures.scalar_decay.family import ScalarDecayFamily
from hf_compressm.architectures.selective.family import SelectiveFamily
from hf_compressm.architectures.time_invariant.family import TimeInvariantFamily
from hf_compressm.console import cli
from hf_compressm.sharing.hub import push_folder
from hf_compressm.storage.records import TENSORS, Observation, ReductionEvent
from hf_compressm.theory.criteria import CRITERIA
from hf_compressm.theory.group_criteria import GROUP_CRITERIA

READER = "hf_reader"  # the token of `user`, whom the pages let push, and who owns the checkpoints that they name
SMALL = ["--length", "32", "--calibration-batches", "4"]  # of the console, where the text of the tests is short


# What the pages call the reader's own


def model_args_dataset(folder, dataset, batches, tokenizer) -> dict:
    arguments = {"max_steps": 100, "learning_rate": 3e-3, "save_strategy": "no", "report_to": "none"}
    args = TrainingArguments(str(folder / "runs"), use_cpu=True, disable_tqdm=True, **arguments)
    return {"model": build_model(), "args": args, "dataset": dataset, "batches": batches}


def of_trl_as_well(folder, dataset, batches, tokenizer) -> dict:
    arguments = {"max_steps": 4, "save_strategy": "no", "report_to": "none", "packing": True, "max_length": 64}
    arguments |= {"per_device_train_batch_size": 2, "bf16": False}
    sft_args = SFTConfig(str(folder / "sft"), use_cpu=True, disable_tqdm=True, **arguments)
    texts = Dataset.from_dict({"text": (folder / "my.txt").read_text().split("\n\n")[:400]})
    with_targets = [{"input_ids": batch["input_ids"], "targets": batch["labels"]} for batch in batches]
    own = {"sft_args": sft_args, "texts": texts, "tokenizer": tokenizer, "batches_with_targets": with_targets}
    return own | model_args_dataset(folder, dataset, batches, tokenizer)


def a_mamba(folder, dataset, batches, tokenizer) -> dict:
    return {"mamba": build_model(), "batches": batches}


def a_trainer_that_pushes(folder, dataset, batches, tokenizer) -> dict:
    goal = CompreSSMConfig(target_state_size=4, calibration_batches=2)
    callback = CompreSSMCallback(goal, CompreSSMSchedule(end=0.5, events=2))
    trainer = build_trainer(folder / "runs", dataset, push_to_hub=True)
    return {"trainer": trainer, "callback": callback, "model": trainer.model, "tokenizer": tokenizer}


READERS_OWN = {
    "README.md": model_args_dataset,
    "training.md": of_trl_as_well,
    "theory.md": a_mamba,
    "sharing.md": a_trainer_that_pushes,
}


@pytest.fixture
def hub(monkeypatch, tmp_path, models):
    """A Hub with a reader who may push, and a Mamba under the name that the pages use."""
    monkeypatch.setitem(TOKENS, READER, Token("user", organizations=("state-spaces",)))
    with HubServer() as server:
        server.use_here(monkeypatch, token=READER, home=tmp_path)
        push_folder(models / "uniform", "state-spaces/mamba-130m-hf")
        yield server


@pytest.fixture
def checkout(tmp_path, models, monkeypatch):
    """The folder that the pages are read in: parts of the repository, a text, checkpoints."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("scripts", "model_cards", "constraints.txt", "setup.cfg"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    shutil.copy(import_module("pretrain").embedded_text(), folder / "kjv.jsonl")
    shutil.copy(models / "text.txt", folder / "my.txt")
    shutil.copytree(models / "whole", folder / "mamba")
    shutil.copytree(models / "uniform", folder / "small-mamba")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_works(page, checkout, hub, models, dataset, batches, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(models / "whole")
    own = READERS_OWN.get(page.name, lambda *_: {})(checkout, dataset, batches, tokenizer)
    namespace = {"__name__": "page"} | own
    for block, after in pairwise([*blocks_of(page), None]):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: a block of the language '{block.language}'"
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.text  # so that an error names the line of the page
            exec(compile(code, str(page), "exec"), namespace)
        elif block.language == "bash":
            output = after.text if after is not None and after.language == "text" else ""
            for line in lines_of(block, output):
                run(line, monkeypatch, capsys)
    for line in inline_lines_of(page):
        run(line, monkeypatch, capsys)
    for call in inline_calls_of(page):
        eval(call, {"CompreSSMConfig": CompreSSMConfig, "CompreSSMSchedule": CompreSSMSchedule})


# Console lines


def run(line: ConsoleLine, monkeypatch, capsys) -> None:
    """Run a console line, or check it where it cannot be run here."""
    program, *options = line.words
    monkeypatch.setattr(sys, "argv", line.words[1:])  # where a script looks for its options
    try:
        CONSOLE[program](options, line, capsys)
    except SystemExit as ended:
        assert not ended.code, f"{line.where}: {' '.join(line.words)}: {capsys.readouterr().err}"


def run_hf_compressm(options, line: ConsoleLine, capsys) -> None:
    """Really, in this process; the text is short, unless the page shows what is printed."""
    is_shortened = "--text" in options and not line.output
    capsys.readouterr()
    code = cli.main([*options, *(SMALL if is_shortened else [])])
    printed = capsys.readouterr()
    assert code == 0, f"{line.where}: {printed.err}"
    if line.output:
        assert_alike(printed.out, line.output)


def check_pip(options, line: ConsoleLine, capsys) -> None:
    """Not run: this environment is the one it would change, and CI runs the command. The extra must exist."""
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\[(\w+)\]", " ".join(options)):
        assert extra in extras["options.extras_require"], f"{line.where}: no extra '{extra}'"
    assert "-c" not in options or (ROOT / options[options.index("-c") + 1]).is_file()


def check_python(options, line: ConsoleLine, capsys) -> None:
    """Of a script its own parser reads the options; `python -m pytest` is this very run."""
    if options[0] == "-m":
        assert options == ["-m", "pytest"]
    else:
        SCRIPTS[options[0]](options[1:])


def check_launch(options, line: ConsoleLine, capsys) -> None:
    """Accelerate's parser reads its options and its configuration; the script's parser reads the rest."""
    assert options[0] == "launch"
    launch = launch_command_parser().parse_args(options[1:])
    assert load_config_from_file(launch.config_file).num_processes >= 1
    SCRIPTS[launch.training_script](launch.training_script_args)


CONSOLE = {
    "hf-compressm": run_hf_compressm,
    "pip": check_pip,
    "python": check_python,
    "accelerate": check_launch,
}


def check_pretrain(options, own_arguments: type | None = None) -> None:
    """Not run: it takes minutes, or a data set of the Hub and GPUs; tests/scripts runs it small, and launched."""
    pretrain = import_module("pretrain")
    own_arguments = own_arguments or pretrain.PretrainingArguments
    groups = own_arguments, CompreSSMConfig, CompreSSMSchedule, pretrain.ModelArguments, pretrain.DataArguments
    pretrain.parse_arguments([*options, "--use_cpu"], groups)  # which bf16 needs where there is no GPU


def check_accelerate_loop(options) -> None:
    """Not run: it takes minutes; tests/scripts runs it small, and launched."""
    check_pretrain(options, import_module("accelerate_loop").LoopArguments)


def check_reproduce(options) -> None:
    """Not run: a study takes an hour, or a GPU; it is stopped before its first run, where there are no results."""
    sys.argv += ["--report_only", "--output_dir", "nothing"]
    with pytest.raises(SystemExit, match="no results in nothing"):
        import_module("reproduce").main()


def check_compare_reductions(options) -> None:
    """Not run: it takes more than an hour."""
    HfArgumentParser(import_module("compare_reductions").Arguments).parse_args_into_dataclasses(options)


def check_benchmark(options) -> None:
    """Not run: it takes ten minutes of a machine that does nothing else, or a GPU."""
    import_module("benchmark").parse_arguments(options)


def check_benchmark_analysis(options) -> None:
    """Not run: it takes many minutes of a machine that does nothing else. It has its options from `main` alone."""
    assert not options and (ROOT / "scripts" / "benchmark_analysis.py").is_file()


def check_benchmark_engines(options) -> None:
    """Not run: it takes minutes and gigabytes."""
    HfArgumentParser(import_module("benchmark_engines").Arguments).parse_args_into_dataclasses(options)


SCRIPTS = {
    "scripts/pretrain.py": check_pretrain,
    "scripts/accelerate_loop.py": check_accelerate_loop,
    "scripts/reproduce.py": check_reproduce,
    "scripts/compare_reductions.py": check_compare_reductions,
    "scripts/benchmark.py": check_benchmark,
    "scripts/benchmark_analysis.py": check_benchmark_analysis,
    "scripts/benchmark_engines.py": check_benchmark_engines,
}


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def assert_alike(printed: str, shown: str) -> None:
    """The same words, and numbers that differ by less than what another machine's arithmetic may change."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=2e-3, atol=1e-3)


# The pages themselves


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in links_of(page):
        assert target.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(target), f"{page.name} links to #{anchor} of {target.name}"


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = {target for target, _ in links_of(ROOT / "README.md")}
    assert set(PAGES[1:]) <= linked


def test_every_public_name_is_told_of_in_the_docs():
    text = "\n".join(page.read_text() for page in PAGES)
    assert all(re.search(rf"\b{name}\b", text) for name in hf_compressm.__all__)


def test_the_file_format_names_every_field_of_the_records():
    text = (ROOT / "docs" / "file-format.md").read_text()
    names = {field.name for kind in (ReductionEvent, Observation) for field in fields(kind)} - set(TENSORS)
    assert not {name for name in names if f"`{name}`" not in text}


def test_every_option_is_told_of_in_the_docs():
    text = "\n".join(page.read_text() for page in PAGES)
    names = {field.name for kind in (CompreSSMConfig, CompreSSMSchedule) for field in fields(kind)}
    assert not {name for name in names if not re.search(rf"\b{name}\b", text)}


KINDS = (Family, SelectiveFamily, TimeInvariantFamily, ScalarDecayFamily)


def test_the_check_list_for_an_architecture_is_complete():
    text = (ROOT / "docs" / "adding-an-architecture.md").read_text()
    names = {name for kind in KINDS for name in public_names(kind)}
    assert not {name for name in names if f"`{name}`" not in text}


def public_names(kind: type) -> set[str]:
    """What a class declares or defines by itself."""
    return {name for name in {*vars(kind), *kind.__annotations__} if not name.startswith("_")}


def test_the_readme_names_every_model_type_that_is_served():
    text = (ROOT / "README.md").read_text()
    assert not {model_type for model_type in FAMILIES if f"`{model_type}`" not in text}


def test_the_page_of_the_theory_has_every_criterion_with_its_power():
    lines = (ROOT / "docs" / "theory.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    told = {row[0].split("`")[1]: row[2] for row in rows if len(row) > 2}
    powers = {name: str(criterion.power) for name, criterion in (CRITERIA | GROUP_CRITERIA).items()}
    assert {name: told.get(name) for name in powers} == powers
