"""The console command: what it prints and writes, its exit codes, and that a failure leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import LAYERS, VOCABULARY, assert_identical, contents, copy_of, weights_of
from datasets import Dataset
from huggingface_hub import ModelCard
from processes import run_program
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compressm.architectures import state_sizes
from hf_compressm.architectures.selective.per_layer import CompreSSMMambaForCausalLM
from hf_compressm.console import cli
from hf_compressm.console.cli import main
from hf_compressm.storage.history import load_history
from hf_compressm.storage.loading import load_language_model

COMMANDS = ("estimate", "analyze", "compress", "export", "push", "env")
SMALL = ["--length", "32", "--calibration-batches", "4"]


@pytest.fixture
def text(models) -> list[str]:
    return ["--text", str(models / "text.txt"), *SMALL]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_the_real_command_analyzes_and_a_bad_one_says_so(models, text, tmp_path):
    before = contents(models)
    command = [sys.executable, "-m", "hf_compressm.console.cli", "analyze", str(models / "whole"), *text]
    command += ["--output", str(tmp_path / "analysis")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layer" in done.stdout and "reading the text" in done.stderr and "Traceback" not in done.stderr
    assert "Memory in GB: weights" in done.stderr and "A forward pass takes" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["analysis"] and contents(models) == before
    command = "import sys; from hf_compressm.console.cli import main; sys.exit(main())"
    bad = run_program(command, "analyze", tmp_path / "none", *text, "--output", tmp_path / "bad", check=False)
    assert bad.returncode == 2 and bad.stdout == "" and "Traceback" not in bad.stderr
    assert bad.stderr.splitlines()[-1].startswith(f"hf-compressm analyze: {tmp_path / 'none'} is neither a folder nor")
    assert sorted(os.listdir(tmp_path)) == ["analysis"]


def test_an_estimate_needs_nothing_but_a_config(models, tmp_path, capsys):
    shutil.copy(models / "whole" / "config.json", tmp_path)
    assert run("estimate", tmp_path, "--target-state-size", 4, *SMALL) == 0
    printed = capsys.readouterr().out
    parameters = load_language_model(models / "whole").num_parameters()
    assert f"{LAYERS} layers with a state, {parameters:,} parameters; 4 batches of 128 tokens." in printed
    assert run("estimate", tmp_path / "none", "--target-state-size", 4) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"hf-compressm estimate: {tmp_path / 'none'} is neither a folder nor the name")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert run("estimate", tmp_path, "--target-state-size", 4) == 2
    assert "cannot resize the state of model type 'bert'" in capsys.readouterr().err


def test_analyze_prints_a_table_and_writes_json_and_a_picture(models, text, tmp_path, capsys):
    before = contents(models)
    assert (
        run("analyze", models / "whole", *text, "--target-state-size", 4, "--output", tmp_path / "deep" / "out") == 0
    )
    printed = capsys.readouterr().out
    assert "16" in printed and "Written to" in printed
    assert contents(models) == before
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == ["analysis.json", "scores.png"]
    assert (tmp_path / "deep" / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "deep" / "out" / "analysis.json").read_text())
    assert content["config"]["target_state_size"] == 4 and content["criterion"] == "output"
    assert content["tokens"] > 0 and content["loss_before"] > 1 and content["loss_after"] > 1
    assert [layer["layer"] for layer in content["layers"]] == list(range(LAYERS))
    for layer in content["layers"]:
        assert layer["state_size"] == 16 and layer["proposed_state_size"] == 4
        assert layer["scores"] == sorted(layer["scores"], reverse=True) and len(layer["scores"]) == 16
        assert 0 <= layer["score_discarded"] <= 1
        assert layer["score_discarded"] == pytest.approx(1 - sum(layer["scores"][:4]) / sum(layer["scores"]))
        assert layer["hankel_singular_values"] == sorted(layer["hankel_singular_values"], reverse=True)


def test_analyze_without_a_folder_writes_nothing(models, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(models)
    assert run("analyze", models / "per_layer", *text, "--cut-fraction", 0.5, "--allocation", "per_layer") == 0
    assert contents(models) == before and contents(tmp_path) == {}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "column"])
def test_text_comes_in_several_kinds_of_files(models, verses, tmp_path, kind):
    column = "verse" if kind == "column" else "text"
    data = Dataset.from_dict({column: verses[:300], "other": [1] * 300})
    file = tmp_path / f"text.{'jsonl' if kind == 'column' else kind}"
    data.to_parquet(file) if kind == "parquet" else data.to_json(file)
    assert run("analyze", models / "whole", "--text", file, *SMALL, "--text-column", column) == 0


@pytest.mark.parametrize(
    ("goal", "sizes"),
    [
        (["--target-state-size", 5], [5, 5]),
        (["--loss-budget", 0.05], None),
        (["--cut-fraction", 0.25, "--allocation", "per_layer"], [12, 12]),
        (["--tolerance", 0.3, "--allocation", "per_layer", "--multiple-of", 2, "--criterion", "magnitude"], None),
    ],
)
def test_compress_writes_a_model_that_loads_with_all_that_belongs_to_it(models, text, tmp_path, capsys, goal, sizes):
    before, target = contents(models), tmp_path / "small"
    assert run("compress", models / "whole", target, *text, *goal) == 0
    printed = capsys.readouterr().out
    assert contents(models) == before and os.listdir(tmp_path) == ["small"]
    history = load_history(target)
    event = history.events[-1]
    assert len(history.events) == 1 and event.step is None and event.state_sizes_before == [16, 16]
    assert sizes is None or event.state_sizes_after == sizes
    assert f"{event.loss_before:.4f}" in printed and f"{event.loss_after:.4f}" in printed
    sizes = sorted(set(event.state_sizes_after))
    assert f"Saved in {target}: N = {', '.join(map(str, sizes))}\n" in printed
    if "--loss-budget" in goal:
        assert event.loss_after - event.loss_before <= 0.05 and event.is_cut
    model = load_language_model(target)
    assert list(state_sizes(model).values()) == event.state_sizes_after
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert AutoTokenizer.from_pretrained(target).eos_token == "<end>"
    assert (target / "spectra.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(target / "README.md")
    assert "compressm" in card.data.tags and card.data.base_model is None and "# small" in card.text
    assert json.loads((target / "config.json").read_text())["compressm"]["goals"] == [event.goal]


def test_compress_appends_to_the_history_of_its_source(models, text, tmp_path):
    before = load_history(models / "uniform")
    assert run("compress", models / "uniform", tmp_path / "small", *text, "--target-state-size", 2) == 0
    after = load_history(tmp_path / "small")
    assert [event.state_sizes_after for event in after.events] == [[4, 4], [2, 2]]
    assert after.to_dict()["events"][0] == before.to_dict()["events"][0] and after.config == before.config
    assert load_history(models / "uniform").to_dict() == before.to_dict()
    assert run("compress", models / "per_layer", tmp_path / "ragged", *text, "--cut-fraction", 0.5) == 0
    assert [event.state_sizes_after for event in load_history(tmp_path / "ragged").events] == [[8, 16], [4, 8]]
    assert type(load_language_model(tmp_path / "ragged")) is CompreSSMMambaForCausalLM


def test_compress_that_can_cut_nothing_saves_the_model_as_it_was(models, text, tmp_path, capsys):
    assert run("compress", models / "whole", tmp_path / "same", *text, "--tolerance", 1e-9) == 0
    assert "Nothing could be cut within this goal; the model was saved as it was." in capsys.readouterr().out
    left, right = (load_language_model(folder) for folder in (models / "whole", tmp_path / "same"))
    assert_identical(weights_of(left), weights_of(right))


@pytest.mark.parametrize("more", [(), ("--refit",)])
def test_compress_measures_the_loss_that_the_written_model_has(models, text, tmp_path, more):
    """Analysed again with nothing to cut, it starts from the loss that it had after the cut."""
    run("compress", models / "whole", tmp_path / "small", *text, "--target-state-size", 3, *more)
    run("analyze", tmp_path / "small", *text, "--target-state-size", 3, "--output", tmp_path / "again", *more)
    again = json.loads((tmp_path / "again" / "analysis.json").read_text())
    assert again["loss_before"] == pytest.approx(load_history(tmp_path / "small").events[0].loss_after, abs=1e-5)


@pytest.mark.parametrize(
    ("form", "options"),
    [("uniform", ["--state-size", 20]), ("bf16", []), ("sharded", ["--max-shard-size", "20KB"]), ("mamba_ssm", [])],
)
def test_export_writes_every_format(models, tmp_path, capsys, form, options):
    target = tmp_path / "target"
    assert run("export", models / "per_layer", target, "--to", form, *options) == 0
    assert f"{target}: N = " in capsys.readouterr().out
    sizes = {"uniform": [20, 20], "mamba_ssm": [16, 16]}.get(form, [8, 16])
    assert list(state_sizes(load_language_model(target)).values()) == sizes
    assert (target / "pytorch_model.bin").exists() == (form == "mamba_ssm")
    assert (target / "model.safetensors.index.json").exists() == (form == "sharded")
    if form == "bf16":
        assert AutoModelForCausalLM.from_pretrained(target).dtype is torch.bfloat16


def test_what_mamba_ssm_wrote_can_be_analyzed_and_compressed(models, text, tmp_path):
    assert run("export", models / "whole", tmp_path / "original", "--to", "mamba_ssm") == 0
    for file in (tmp_path / "original").glob("tokenizer*"):
        file.unlink()  # mamba_ssm's own have none
    options = ["--tokenizer", models / "whole", "--target-state-size", 4]
    assert run("compress", tmp_path / "original", tmp_path / "small", *text, *options) == 0
    assert state_sizes(load_language_model(tmp_path / "small")) == {0: 4, 1: 4}
    assert AutoTokenizer.from_pretrained(tmp_path / "small").eos_token == "<end>"


def test_env_names_versions_and_scans(capsys):
    assert run("env") == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["torch"] == torch.__version__ and {"python", "transformers", "hf_compressm"} <= printed.keys()


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_says_what_it_does_and_how(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        run(*filter(None, [command]), "--help")
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "usage: hf-compressm" in printed
    if command is None:
        assert all(f"hf-compressm {each}" in printed for each in COMMANDS) and "exit codes: 0 done, 2 bad" in printed
        assert all(cli.__dict__[f"run_{each}"].__doc__ in " ".join(printed.split()) for each in COMMANDS)
    else:
        assert len(printed.splitlines()) > 4


# Each kind of bad input: exit code 2, one clear line, nothing written.

BAD = {
    "no-model": (["{tmp}/none"], "{tmp}/none is neither a folder nor the name of a repository (user/name)."),
    "model-is-a-file": (["{models}/text.txt"], "text.txt is neither a folder nor"),
    "not-a-name": (["a/b/c"], "a/b/c is neither a folder nor"),
    "not-a-model": (["{models}"], "config.json"),
    "no-text": (["{models}/whole", "--text", "{tmp}/none.txt"], "none.txt is not a file"),
    "text-is-a-folder": (["{models}/whole", "--text", "{models}"], "allowed: .txt, .json, .jsonl, .parquet files"),
    "text-of-another-kind": (
        ["{models}/whole", "--text", "{models}/whole/model.safetensors"],
        "allowed: .txt, .json",
    ),
    "text-without-the-column": (["{models}/whole", "--text", "{other}/other.jsonl"], "has no column 'text'; it has"),
    "text-that-is-empty": (["{models}/whole", "--text", "{other}/empty.txt"], "empty.txt"),
    "text-that-is-damaged": (["{models}/whole", "--text", "{other}/damaged.jsonl"], "damaged.jsonl"),
    "text-that-is-no-text": (["{models}/whole", "--text", "{other}/numbers.jsonl"], "numbers.jsonl"),
    "text-without-words": (["{models}/whole", "--text", "{other}/null.jsonl"], "null.jsonl"),
    "too-little-text": (
        ["{models}/whole", "--text", "{other}/short.txt"],
        "4 batches of 4 × 32 need 512: give more text",
    ),
    "no-length": (["{models}/whole", "--length", "0"], "length"),
    "negative-length": (["{models}/whole", "--length", "-3"], "length"),
    "one-token": (["{models}/whole", "--length", "1"], "no token to predict"),
    "no-batch": (["{models}/whole", "--batch-size", "0"], "batch_size"),
    "tolerance": (["{models}/whole", "--tolerance", "1.5"], "tolerance = 1.5; allowed: a share in (0, 1)"),
    "tolerance-nan": (["{models}/whole", "--tolerance", "nan"], "tolerance = nan; allowed"),
    "loss-budget": (["{models}/whole", "--loss-budget", "-1"], "loss_budget = -1.0; allowed: > 0"),
    "cut-fraction": (["{models}/whole", "--cut-fraction", "0"], "cut_fraction = 0.0; allowed"),
    "target-zero": (["{models}/whole", "--target-state-size", "0"], "target_state_size = 0; allowed"),
    "target-too-large": (
        ["{models}/whole", "--target-state-size", "17"],
        "is above the model's 16 states; give 1 … 16",
    ),
    "two-goals": (
        ["{models}/whole", "--tolerance", "0.1", "--loss-budget", "0.1"],
        "give exactly one of tolerance, target_state_size, loss_budget, cut_fraction; got tolerance, loss_budget",
    ),
    "criterion": (["{models}/whole", "--criterion", "best"], "criterion = 'best'; allowed: one of"),
    "allocation": (["{models}/whole", "--allocation", "x"], "allocation = 'x'; allowed: one of uniform, per_layer"),
    "batches": (["{models}/whole", "--calibration-batches", "1"], "calibration_batches = 1; allowed: a whole number"),
    "multiple": (["{models}/whole", "--multiple-of", "0"], "multiple_of = 0; allowed"),
    "tokenizer": (["{models}/whole", "--tokenizer", "{tmp}/none"], "{tmp}/none"),
    "other-tokenizer": (["{models}/whole", "--tokenizer", "{other}/large"], "{other}/large"),
    "device": (["{models}/whole", "--device", "abacus"], "abacus"),
    "no-such-device": (["{models}/whole", "--device", "cuda:77"], "cuda"),
}


@pytest.fixture(scope="session")
def other(models, tmp_path_factory):
    """Texts and a tokenizer that do not do."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "other.jsonl").write_text('{"other": "x"}\n' * 3)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("In the beginning was the Word.\n" * 9)
    (folder / "damaged.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (folder / "numbers.jsonl").write_text('{"text": 5}\n' * 3000)
    (folder / "null.jsonl").write_text('{"text": null}\n' * 3000)
    copy_of(models / "whole", folder / "large")
    tokenizer = AutoTokenizer.from_pretrained(folder / "large")
    tokenizer.add_tokens([f" {word}" for word in ("the", "and", "of", "And")])  # ids that the model does not have
    assert len(tokenizer) > VOCABULARY
    tokenizer.save_pretrained(folder / "large")
    return folder


@pytest.mark.parametrize("command", ["analyze", "compress"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line_and_changes_nothing(models, other, text, tmp_path, capsys, name, command):
    arguments, message = BAD[name]
    places = {"models": models, "tmp": tmp_path, "other": other}
    model, *options = (argument.format(**places) for argument in arguments)
    target = tmp_path / "new" / "target"
    output = [target] if command == "compress" else ["--output", target]
    before = contents(models)
    code = run(
        command, model, *(output if command == "compress" else ()), *text, *options, *output[command == "compress" :]
    )
    error = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert code == 2, error
    assert error.startswith(f"hf-compressm {command}: ") and message.format(**places) in error
    assert contents(tmp_path) == {} and contents(models) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["analyze"],
        ["analyze", "model"],
        ["compress", "model", "--text", "x.txt"],
        ["compress", "model", "small", "--text", "x.txt", "--target-state-size", "four"],
        ["compress", "model", "small", "--text", "x.txt", "--tolerance", "much"],
        ["compress", "model", "small", "--text", "x.txt", "--target", "4"],
        ["export", "model", "target"],
        ["export", "model", "target", "--to", "gguf"],
        ["export", "model", "target", "--to", "uniform", "--state-size", "4.5"],
        ["push", "folder"],
        ["env", "--verbose"],
    ],
)
def test_a_command_line_that_makes_no_sense_gets_its_usage(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and "usage: hf-compressm" in capsys.readouterr().err and contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "{tmp}/target", "--to", "bf16"], "none is neither a folder nor"),
        (["{models}", "{tmp}/target", "--to", "bf16"], "config.json"),
        (["{models}/per_layer", "{tmp}/target", "--to", "uniform", "--state-size", "8"], "a layer has 16"),
        (["{models}/per_layer", "{tmp}/target", "--to", "uniform", "--state-size", "0"], "cannot enlarge to 0 states"),
        (["{models}/whole", "{tmp}/target", "--to", "sharded", "--max-shard-size", "x"], "max_shard_size"),
        (["{models}/whole", "{tmp}/target", "--to", "sharded", "--max-shard-size", "9GB"], "fits into one file"),
        (["{models}/whole", "{tmp}/target", "--to", "bf16", "--state-size", "20"], "--state-size"),
    ],
)
def test_an_export_of_what_is_not_there_is_refused(models, tmp_path, capsys, arguments, message):
    code = run("export", *(argument.format(models=models, tmp=tmp_path) for argument in arguments))
    error = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert code == 2 and error.startswith("hf-compressm export: ") and message in error
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("kind", ["folder", "file", "link", "parent-is-a-file"])
def test_an_output_that_exists_is_refused_before_any_work(models, text, tmp_path, capsys, monkeypatch, kind):
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    elif kind == "link":
        target.symlink_to("nowhere")
    else:
        target.write_text("mine")
    monkeypatch.setattr(cli, "analyze", None)  # calling it would be a TypeError
    before = contents(tmp_path)
    output = target / "inside" if kind == "parent-is-a-file" else target
    for command in (
        ["compress", models / "whole", output, *text],
        ["export", models / "whole", output, "--to", "bf16"],
    ):
        assert run(*command) == 2
        error = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert error.startswith(f"hf-compressm {command[0]}: ") and str(target) in error
        assert contents(tmp_path) == before


def test_an_analysis_that_could_not_be_written_is_refused_before_any_work(models, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("mine")
    monkeypatch.setattr(cli, "analyze", None)
    assert run("analyze", models / "whole", *text, "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'out'}" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


def test_a_source_with_a_damaged_history_is_refused_before_any_work(models, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "token_batches", None)
    source = copy_of(models / "uniform", tmp_path / "source")
    (source / "compressm.json").write_text("{")
    before = contents(tmp_path)
    assert run("compress", source, tmp_path / "small", *text, "--target-state-size", 2) == 2
    assert "compressm.json is truncated or damaged" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("where", ["analyze", "compress", "save_history", "write_pictures", "write_model_card"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_compression_that_ends_early_leaves_nothing(models, text, tmp_path, monkeypatch, capsys, where, kind):
    def ending(*args, **kwargs):
        raise kind("out of luck")

    monkeypatch.setattr(cli, where, ending)
    command = ["compress", models / "whole", tmp_path / "small", *text, "--target-state-size", 4]
    interrupted = kind is KeyboardInterrupt
    assert run(*command) == (130 if interrupted else 1)
    assert ("hf-compressm compress failed: out of luck" in capsys.readouterr().err) == (not interrupted)
    assert contents(tmp_path) == {}
