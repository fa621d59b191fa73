"""The scripts as a user runs them: real text, a real tokenizer, in processes of their own.

The first run, and one with each configuration of `accelerate launch`, are launched as the README says; the others are
forks of a process that has imported the same already.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, assert_identical
from datasets import Dataset
from processes import run_in_processes, run_program
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_compressm.storage.history import load_history

SMALL = """
    --max_steps 20 --end 0.5 --events 2 --target_state_size 4 --state_size 16 --hidden_size 32 --num_hidden_layers 2
    --block_size 32 --vocab_size 512 --logging_steps 1 --save_steps 8 --save_total_limit 5 --calibration_batches 2
    --use_cpu --validation_examples 50
""".split()


PRETRAIN = ROOT / "scripts" / "pretrain.py"


def pretrain(
    folder, *more, launcher=(sys.executable,), script=PRETRAIN, check=True, options=SMALL
) -> subprocess.CompletedProcess:
    command = [*launcher, str(script), *options, "--output_dir", str(folder), *more]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not check or finished.returncode == 0, f"{finished.stdout[-2000:]}\n{finished.stderr[-8000:]}"
    return finished


def forked(folder, *more, script=PRETRAIN, check=True, options=SMALL, environment=None) -> subprocess.CompletedProcess:
    """The same in a fork of a process that has imported torch and Transformers; in two forks, given an environment."""
    arguments = [*options, "--output_dir", folder, *more]
    if environment is None:
        return run_program(script, *arguments, check=check)
    return run_in_processes(2, script, *arguments, check=check, **environment)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, verses):
    path = tmp_path_factory.mktemp("data") / "verses.txt"
    path.write_text("\n\n".join(verses))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, pretrain(folder, "--train_file", str(text_file)).stdout


def test_a_run_shows_what_it_did(finished):
    folder, output = finished
    assert "CompreSSM, step 5 of 20: state size 16 → 8" in output
    assert "CompreSSM, step 10 of 20: state size 8 → 4" in output
    assert re.search(r"N = +4: +[\d,]+ tokens per second \([\d.]+×\)", output)
    assert re.search(r"Validation perplexity: [\d.]+ at N = 4", output)
    assert "Sample: And God said" in output
    assert f"AutoModelForCausalLM.from_pretrained('{folder}')" in output


def test_the_two_printed_lines_load_the_model(finished):
    folder, output = finished
    lines = [line.strip() for line in output.splitlines() if line.startswith("    ")][-2:]
    check = [*lines, "assert model.config.state_size == 4", "from transformers import AutoTokenizer"]
    check.append(f"assert len(AutoTokenizer.from_pretrained({str(folder)!r})) == 512")
    run_program("\n".join(check))
    assert len(json.loads((folder / "compressm.json").read_text())["events"]) == 2


def test_a_run_can_be_resumed_from_the_command_line(finished, text_file):
    folder, _ = finished
    resumed = folder.with_name("resumed")
    options = ["--train_file", str(text_file), "--resume_from_checkpoint", str(folder / "checkpoint-8")]
    forked(resumed, *options)
    logs = [json.loads((f / "checkpoint-20/trainer_state.json").read_text())["log_history"] for f in (folder, resumed)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(finished, text_file):
    folder, _ = finished
    weights = folder / "checkpoint-16" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    options = ["--train_file", str(text_file), "--resume_from_checkpoint", str(folder / "checkpoint-16")]
    failed = forked(folder.with_name("damaged"), *options, check=False)
    weights.write_bytes(content)
    assert failed.returncode != 0
    assert "model.safetensors is truncated or damaged" in failed.stderr.splitlines()[-1]


def launcher_of(configuration: str) -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "scripts" / "accelerate" / f"{configuration}.yaml")),
        *("--main_process_port", "0"),  # a free one
    ]


def environment_of(configuration: str) -> dict[str, str]:
    """What `accelerate launch` tells a script in its environment, beside its rank."""
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    launch = [*launcher_of(configuration)[3:], "--num_processes", "1", "--no_python", sys.executable, "-c", show]
    told = json.loads(run_program("from accelerate.commands.launch import main; main()", *launch).stdout)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def test_it_streams_the_embedded_text_under_accelerate_launch(tmp_path):
    output = pretrain(tmp_path / "run", "--streaming", launcher=launcher_of("single")).stdout
    assert "state size 8 → 4" in output and "Validation perplexity" in output


def perplexity_of(output: str) -> float:
    return float(re.search(r"Validation perplexity: ([\d.]+)", output)[1])


def test_two_processes_train_one_model(finished, tmp_path, text_file):
    options = ["--train_file", str(text_file), "--per_device_train_batch_size", "4"]
    output = pretrain(tmp_path / "run", *options, launcher=launcher_of("ddp")).stdout
    assert output.count("CompreSSM, step 10 of 20: state size 8 → 4") == output.count("Sample: And God said") == 1
    assert perplexity_of(output) == pytest.approx(perplexity_of(finished[1]), rel=1e-3)  # on the same sequences


def test_fsdp_that_accelerate_would_quietly_ignore_is_refused(tmp_path, text_file):
    environment = environment_of("fsdp2")
    failed = forked(tmp_path / "run", "--train_file", str(text_file), environment=environment, check=False)
    assert failed.returncode != 0
    assert "FSDP was asked for, but the model is not sharded" in failed.stderr


def test_fsdp2_trains_the_same_model_resumes_and_saves_it_whole(finished, tmp_path, text_file):
    options = ["--train_file", str(text_file), "--per_device_train_batch_size", "4", "--ddp_backend", "gloo"]
    script = ROOT / "tests" / "engines" / "pretrain_fsdp_on_cpu.py"
    run = pretrain(tmp_path / "run", *options, launcher=launcher_of("fsdp2"), script=script).stdout
    assert perplexity_of(run) == pytest.approx(perplexity_of(finished[1]), rel=1e-3)
    assert (tmp_path / "run" / "checkpoint-8" / "pytorch_model_fsdp_0" / ".metadata").exists()
    resuming = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-8")]
    environment = environment_of("fsdp2")
    resumed = forked(tmp_path / "resumed", *options, *resuming, environment=environment, script=script).stdout
    assert perplexity_of(resumed) == perplexity_of(run)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "resumed")]
    assert_identical(*weights)
    assert weights[0]["backbone.layers.0.mixer.A_log"].shape[1] == 4


LOOP = """
    --max_steps 20 --target_state_size 4 --end 0.5 --events 2 --hidden_size 32 --state_size 16 --num_hidden_layers 2
    --block_size 32 --vocab_size 512 --batch_size 8 --save_steps 8 --calibration_batches 2 --validation_examples 50
""".split()


def test_a_loop_of_ones_own_cuts_resumes_and_saves_a_plain_model(tmp_path, text_file):
    script = ROOT / "scripts" / "accelerate_loop.py"
    options = ["--train_file", str(text_file)]
    output = forked(tmp_path / "run", *options, script=script, options=LOOP).stdout
    assert "State sizes [4, 4]. Saved in" in output
    resuming = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-8")]
    forked(tmp_path / "resumed", *options, *resuming, script=script, options=LOOP)
    assert_identical(*(load_file(tmp_path / name / "model.safetensors") for name in ("run", "resumed")))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.state_size == 4
    assert len(load_history(tmp_path / "resumed").events) == 2

    two = ["--batch_size", "4", "--use_cpu"]
    environment = environment_of("ddp")
    output = forked(tmp_path / "two", *options, *two, script=script, options=LOOP, environment=environment).stdout
    assert output.count("State sizes [4, 4]. Saved in") == 1
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "two"))
    assert max((left[name] - right[name]).abs().max() for name in left) < 1e-3


def test_jsonl_files_for_training_and_validation_are_read(tmp_path, verses):
    for name, rows in (("train", verses[:1500]), ("validation", verses[1500:])):
        Dataset.from_dict({"words": rows}).to_json(tmp_path / f"{name}.jsonl")
    files = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "validation.jsonl")]
    output = forked(tmp_path / "run", *files, "--text_column", "words", "--save_strategy", "no").stdout
    assert "Validation perplexity" in output


def test_a_dataset_and_a_tokenizer_are_taken_by_name(finished, tmp_path, verses):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": verses}).to_parquet(tmp_path / "data" / "train.parquet")
    names = ["--dataset_name", str(tmp_path / "data"), "--tokenizer_name", str(finished[0])]
    goal = ["--cut-fraction", "0.5"]  # argparse takes hyphens too
    small = [word for word in SMALL if word not in ("--target_state_size", "4")]
    output = forked(tmp_path / "run", *names, *goal, "--save_strategy", "no", options=small).stdout
    assert re.search(r"Validation perplexity: [\d.]+ at N = 4", output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "book.pdf"], "allowed: one of .txt, .json, .jsonl, .parquet"),
        (["--tolerance", "0.1"], "give exactly one of tolerance, target_state_size"),
        (["--validation_file", "x.txt"], "validation_file goes with train_file"),
        (["--train_file", "x.txt", "--resume_from_checkpoint", "last"], "no whole checkpoint to resume from"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    failed = forked(tmp_path / "run", *options, check=False)
    assert failed.returncode != 0 and message in failed.stderr.splitlines()[-1]
