"""The studies and benchmarks as a user runs them, on a few steps: every arm, every table, every picture."""

import gzip
import json
import math
import re
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from processes import run_program

ONE_THREAD = {"OMP_THREAD_LIMIT": "1"}  # whatever a study takes: on models this small threads only wait for each other


def run_script(name: str, *arguments, check=True) -> subprocess.CompletedProcess:
    return run_program(ROOT / "scripts" / f"{name}.py", *arguments, check=check, **ONE_THREAD)


def reproduce(folder, *more, check=True) -> subprocess.CompletedProcess:
    return run_script("reproduce", "digits", "--output_dir", folder, *more, check=check)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "digits"
    return folder, reproduce(folder, "--max_steps", "40", "--seeds", "0", "--jobs", "1").stdout


def test_a_study_runs_every_arm_and_tells_what_came_out(study):
    folder, output = study
    results = [json.loads(file.read_text()) for file in folder.glob("*/result.json")]
    by_arm = {result["arm"]: result for result in results}
    assert len(by_arm) == len(results) == 16
    reduced = by_arm["reduced in training, τ = 0.1"]["state_sizes"]
    assert reduced[0] < by_arm["full"]["state_sizes"][0] == 64
    for arm in ("scratch, as τ = 0.1", "truncated after training, as τ = 0.1", "random kept, as τ = 0.1"):
        assert by_arm[arm]["state_sizes"] == reduced
    assert all(0 < result["accuracy"] < 1 for result in results)
    assert all(f"| {arm} |" in output for arm in by_arm)
    assert (folder / "accuracy.png").stat().st_size > 10_000


def test_a_finished_study_is_not_run_again_but_reported(study):
    folder, output = study
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}
    again = reproduce(folder, "--max_steps", "40", "--seeds", "0", "--jobs", "1").stdout
    assert {file: file.stat().st_mtime_ns for file in times} == times
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in (output, again)]
    assert tables[0] == tables[1] and len(tables[0]) == 18
    other = reproduce(folder, "--max_steps", "41", "--seeds", "0", check=False)
    assert other.returncode != 0 and "was made with other settings" in other.stderr


@pytest.fixture(scope="module")
def studies():
    """The package `studies`, as the scripts import it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import studies.scalar_decay_readings
        import studies.tasks

        yield studies
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def tasks(studies):
    return studies.tasks


def test_recall_asks_for_the_value_that_a_key_came_with(tasks):
    ids, labels = vars(tasks.AssociativeRecall(pairs=3, queries=5, keys=6, values=4).sequences(200, seed=1)).values()
    assert ids.shape == labels.shape == (200, 2 * 3 + 5 + 1)
    assert (labels[:, :7] == tasks.IGNORED).all()
    for sequence, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        told = dict(zip(sequence[0:6:2], sequence[1:6:2], strict=True))
        assert len(told) == 3 and max(told) < 6 <= min(told.values()) and max(told.values()) < 10
        # The answer to the key at position k is the label at k + 1.
        assert [told[key] for key in sequence[6:11]] == answers[7:]


def test_copying_asks_for_the_symbols_in_order(tasks):
    ids, labels = vars(tasks.SelectiveCopying(told=4, length=9, symbols=5).sequences(200, seed=1)).values()
    assert ids.shape == labels.shape == (200, 9 + 1 + 4)
    for sequence, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        symbols = [token for token in sequence[:9] if token]
        assert sequence[9] == 1 and symbols == sequence[10:] == answers[10:] and len(symbols) == 4 and min(symbols) > 1
    assert (labels[:, :10] == tasks.IGNORED).all() and len({tuple(row[:9]) for row in ids.tolist()}) > 190


@pytest.mark.parametrize("name", ["AssociativeRecall(3, 5, 6, 4)", "SelectiveCopying(4, 9, 5)"])
def test_a_task_is_drawn_from_its_seed_alone(tasks, name):
    task = eval(name, vars(tasks))
    first, again, other = (task.sequences(8, seed).input_ids for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_answers_are_judged_where_they_are_asked_for(tasks):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=4, hidden_size=8, state_size=2, num_hidden_layers=1))
    data = tasks.SelectiveCopying(told=2, length=3, symbols=2).sequences(6, seed=0)
    measured = tasks.answered(model, data, batch_size=4)
    with torch.no_grad():
        outputs = model(data.input_ids, labels=data.labels)
    guesses = outputs.logits[:, 3:5].argmax(-1)
    assert measured["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx((guesses == data.labels[:, 4:]).float().mean().item())


def test_parts_start_afresh_once_after_a_cut(tasks):
    from studies.models import AFRESH, model_of
    from studies.training import Afresh

    from hf_compressm.architectures import state_layers
    from hf_compressm.surgery.shrink_and_grow import shrink_state
    from hf_compressm.theory.plan import Selection

    architecture = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    for parts in ([], AFRESH[:1], AFRESH[:2], AFRESH):
        model = model_of(architecture, 8)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
        optimizer.step()
        callback, (mixer,) = Afresh(parts, seed=0), state_layers(model).values()
        callback.on_step_begin(None, None, None, model=model)
        callback.on_step_end(None, None, None, model=model, optimizer=optimizer)
        assert mixer.A_log.shape[1] == 8 and optimizer.state  # nothing was cut yet
        shrink_state(model, {0: Selection(torch.tensor([2, 5]))}, optimizer)
        kept = mixer.x_proj.weight.clone()
        callback.on_step_end(None, None, None, model=model, optimizer=optimizer)
        rates = torch.tensor([1.0, 2.0] if "decay rates" in parts else [3.0, 6.0])
        assert torch.allclose(mixer.A_log.exp().mean(0), rates, atol=0.02)
        changed = (mixer.x_proj.weight != kept).any(1)
        assert changed.tolist() == [False] * mixer.time_step_rank + ["maps" in parts] * 4
        assert bool(optimizer.state) == ("moments" not in parts)


def test_states_grow_when_none_is_to_spare(tasks):
    from studies.models import model_of
    from studies.training import WHEN_FLAT, Regrowth, effective_number
    from transformers import TrainerState

    from hf_compressm.architectures import state_layers, state_sizes

    assert effective_number(torch.tensor([3.0, 3.0, 3.0])) == pytest.approx(3)
    assert effective_number(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    model = model_of({"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}, 2)
    layers = state_layers(model)
    maps = layers.family.maps(layers.whole_tensors(0), layers[0])
    with torch.no_grad():
        maps.A_log[:] = maps.A_log[:, :1]  # both states the same, but the second hardly seen
        maps.B_rows[:] = maps.B_rows[:1]
        maps.C_rows[:] = maps.C_rows[:1] * torch.tensor([[1.0], [0.01]])
    batches = [{"input_ids": torch.arange(9)[None]}] * 2
    callback = Regrowth((WHEN_FLAT, 3), batches, {"end": 0.1}, seed=0)

    def size_after(step: int) -> int:
        callback.on_step_end(None, TrainerState(global_step=step, max_steps=20), None, model=model)
        return state_sizes(model)[0]

    assert size_after(4) == 2
    with torch.no_grad():
        maps.C_rows[1] = maps.C_rows[0]
    assert size_after(2) == 2  # not before the cuts are over
    assert size_after(5) == 3  # doubled, but to no more than was said
    assert size_after(6) == 3 and callback.growths == [{"step": 5, "state_size": 3}]


SMALL_STUDY = """
import sys
from dataclasses import replace
from pathlib import Path
from studies.language import STUDIES
from studies.running import all_results
from studies.tasks import AssociativeRecall
from studies.text import EnglishText

name, folder = sys.argv[1:]
study = STUDIES[name]
small = {"hidden_size": 8, "num_hidden_layers": 2}
study = replace(study, steps=20, sizes=(8, 2), learning_rates=(1e-2,), architecture=small)
study = replace(study, task=AssociativeRecall(pairs=4, queries=4, keys=8, values=8))
study = replace(study, difficulties=study.difficulties[:1], training={"per_device_train_batch_size": 8})
if name == "lm":
    study = replace(study, windows=(0.5,), task=EnglishText(300, 32, 4, packages=("anarchism",)))
study.carry_out([0], Path(folder), 1)
study.report(Path(folder), all_results(Path(folder)))
"""


def small_study(name, folder, check=True, **environment) -> subprocess.CompletedProcess:
    """A study of Mamba, of a tiny model."""
    return run_program(SMALL_STUDY, name, folder, check=check, **ONE_THREAD, **environment)


def test_recall_is_studied_in_every_arm_and_told_from_the_results_alone(tmp_path):
    output = small_study("recall", tmp_path).stdout
    results = {result["arm"]: result for result in map(json.loads, (f.read_text() for f in tmp_path.glob("*/*.json")))}
    sizes = {arm: result["state_sizes"] for arm, result in results.items()}
    assert sizes["N = 8 throughout"] == [8, 8] and sizes["N = 2 from scratch"] == [2, 2]
    reached = [arm for arm in results if arm.startswith("8 → 2")]
    assert len(reached) == 21 and all(sizes[arm] == [2, 2] for arm in reached if "flat" not in arm)
    assert all(sizes[arm][0] in (2, 4, 8) for arm in reached if "flat" in arm)
    assert results["8 → 1 at 10 %, grown to 2 at 50 %"]["state_sizes"] == [2, 2]
    cut = results["8 → 2 at 25 %"]
    assert [c["step"] for c in cut["cuts"]] == [5]
    assert [point["state_sizes"] for point in cut["curve"]] == [[8, 8]] * 2 + [[2, 2]] * 8
    longer = results["N = 2 from scratch, as long as 8 → 2 at 50 %"]["settings"]["recipe"]["steps"]
    shorter = results["N = 8 throughout, as long as 8 → 2 at 50 %"]["settings"]["recipe"]["steps"]
    prepared, later = ("difficulty", "rate"), ("as long as", "% accuracy")  # when the steps were chosen
    compared = [arm for arm in results if not arm.startswith(prepared) and not any(name in arm for name in later)]
    times = [results[arm]["seconds_per_step"] for arm in compared]
    seconds = {size: statistics.median(each[size] for each in times if size in each) for size in ("8", "2")}
    whole = 10 * (seconds["8"] + seconds["2"]) + results["8 → 2 at 50 %"]["cutting_seconds"]
    assert (longer, shorter) == (round(whole / seconds["2"]), round(whole / seconds["8"]))
    assert all(f"| {arm} |" in output for arm in results if not arm.startswith(prepared))
    assert (tmp_path / "tables.md").read_text() in output
    pictures = {name: tmp_path / f"{name}.png" for name in ("moments", "time", "stability", "spectra")}
    assert all(picture.stat().st_size > 10_000 for picture in pictures.values())
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/result.json")}
    again = tmp_path / "again"
    for folder in (tmp_path, again):
        run_script("reproduce", "recall", "--report_only", "--output_dir", folder)
        again.mkdir(exist_ok=True)
        (again / "results.json").write_text((tmp_path / "results.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert (tmp_path / "tables.md").read_text().count("| N = 8 throughout |") == 1
    assert (again / "tables.md").read_text() == (tmp_path / "tables.md").read_text()


def test_a_language_model_is_studied_on_text_of_a_debian_package(tmp_path):
    text = (ROOT / "README.md").read_text()
    markdown = tmp_path / "debian" / "usr/share/doc/anarchism/markdown"
    markdown.mkdir(parents=True)
    for part in range(4):
        (markdown / f"{part}.md.gz").write_bytes(gzip.compress(text.encode()))
    output = small_study("lm", tmp_path / "study", ENGLISH_TEXT=str(tmp_path / "debian")).stdout
    assert "recall loss, nats" in output and "| 8 → 2 at 50 %, refitted |" in output
    failed = small_study("lm", tmp_path / "other", check=False, ENGLISH_TEXT=str(tmp_path))
    assert failed.returncode != 0 and "apt-get install anarchism" in failed.stderr


SMALL_STUDY_OF_MAMBA2 = """
import sys
from dataclasses import replace
from pathlib import Path
from studies.running import all_results
from studies.scalar_decay import STUDIES
from studies.tasks import AssociativeRecall

name, folder = sys.argv[1:]
easy = AssociativeRecall(pairs=2, queries=2, keys=4, values=4)
study = replace(STUDIES[name], steps=20, sizes=(8, 4, 2), learning_rates=(1e-2,), scales=(1.0, 4.0), tuned_on=easy)
study = replace(study, task=replace(easy, pairs=4, queries=4, keys=8), difficulties=(easy,))
small = {"hidden_size": 8, "num_hidden_layers": 2} | ({"num_heads": 2, "head_dim": 8} if "2" in name else {})
study = replace(study, architecture=study.architecture | small, training={"per_device_train_batch_size": 8})
study.carry_out([0], Path(folder), 1)
study.report(Path(folder), all_results(Path(folder)))
"""


def test_recall_of_a_mamba2_is_studied_against_its_controls(tmp_path):
    output = run_program(SMALL_STUDY_OF_MAMBA2, "recall-mamba2", tmp_path, **ONE_THREAD).stdout
    results = {result["arm"]: result for result in map(json.loads, (f.read_text() for f in tmp_path.glob("*/*.json")))}
    compared = {arm: result for arm, result in results.items() if not arm.startswith(("difficulty", "rate"))}
    assert len([arm for arm in compared if "started as" not in arm]) == 1 + 2 * 12 + 6 + 3 + 4 + 1
    assert len(results) - len(compared) == 3 + 4 * 2  # a difficulty and two starts
    assert all(f"| {arm} |" in output for arm in compared if "then" not in arm)
    assert "## Reduced after training (1 seeds)" in output and "| GHOST, refitted | " in output
    starts = {size: results[f"N = {size} from scratch"]["settings"]["recipe"] for size in (4, 2)}
    assert starts.keys() == {4, 2} and all(start["state_size"] == size for size, start in starts.items())
    throughout = compared["N = 8 throughout"]
    assert len(throughout["subspaces"]) == len(throughout["curve"]) == 10
    assert throughout["subspaces"][-1]["with_end"] == pytest.approx(1)
    cut = compared["8 → 4 at 25 %"]
    assert [c["step"] for c in cut["cuts"]] == [5]
    sizes = [probe["state_size"] for probe in cut["probes"] if probe["step"] in (4, 5, 6)]
    assert sizes == [8, 8, 4, 4]  # at the cut before and after
    before = [probe for probe in cut["probes"] if probe["step"] <= 5 and probe["state_size"] == 8]
    assert before == [probe for probe in throughout["probes"] if probe["step"] <= 5]  # the same run until then
    longer = compared["N = 4 from scratch, as long as N = 8 throughout"]
    assert longer["settings"]["recipe"]["steps"] == 20
    pictures = [tmp_path / f"{name}.png" for name in ("curves", "steps", "ends", "settling")]
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


TOLD_AGAIN = """
import shutil, sys
from pathlib import Path
from reproduce import STUDIES
from studies.running import GATHERED, all_results

cards, folder = map(Path, sys.argv[1:])
for gathered in cards.glob(f"*/{GATHERED}"):
    name = {"lru-digits": "digits"}.get(gathered.parent.name, gathered.parent.name)
    again = folder / gathered.parent.name
    again.mkdir()
    for file in gathered.parent.glob("*.json"):  # beside the runs, what a step of theirs takes
        shutil.copy(file, again)
    STUDIES[name].report(again, all_results(again))
"""


def tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def test_a_card_tells_what_its_runs_say(tmp_path):
    run_program(TOLD_AGAIN, ROOT / "model_cards", tmp_path, **ONE_THREAD)
    told = {file.parent.name: tables(file.read_text()) for file in tmp_path.glob("*/*.md")}
    assert told.keys() == {file.parent.name for file in (ROOT / "model_cards").glob("*/results.json")}
    for name, found in told.items():
        card = tables((ROOT / "model_cards" / name / "README.md").read_text())
        assert found and [table for table in found if table not in card] == [], name


def test_a_run_takes_what_its_steps_take_by_a_clock(studies, tmp_path):
    """Beside stock sizes a clock may know balanced states, which take longer; a size in between counts as the next."""
    steps = {"64": [1.0, 2.0, 9.0], "8": [1.0], "16 balanced of 64": [1.75], "8 balanced of 64": [1.5]}
    readings, root = studies.scalar_decay_readings, tmp_path
    assert readings.clock_of(root) == {}
    (root / "price.json").write_text(json.dumps({"mamba2": {"throughput": {"seconds": steps}}}))
    clock = readings.clock_of(root)

    def seconds(end, cuts=(), size=64, **recipe):
        recipe = {"state_size": size, "reduction": None} | recipe
        cuts = [{"step": step, "state_sizes": [1, left]} for step, left in cuts]
        return readings.seconds({"settings": {"recipe": recipe}, "cuts": cuts}, end, 64, clock)

    balanced, stock = {"basis": "balanced"}, {"basis": "axis"}
    assert seconds(10) == 20 and seconds(10, size=8) == 10 and seconds(math.inf) == math.inf
    assert seconds(10, projected=(8, "random")) == 15
    assert seconds(10, [(4, 8)], reduction=balanced) == 4 * 2 + 6 * 1.5
    assert seconds(10, [(4, 8)], reduction=stock) == 4 * 2 + 6 * 1
    assert seconds(10, [(2, 20), (4, 12), (9, 8)], reduction=balanced) == 2 * 2 + 2 * 2 + 5 * 1.75 + 1 * 1.5


def test_the_cost_of_the_theory_is_measured(tmp_path):
    options = "--state_sizes 8 16 --state_size 16 --reduced_size 4 --length 16 --rounds 1 --threads 1".split()
    output = run_script("benchmark_analysis", *options, "--output_dir", tmp_path).stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["analysis"]["seconds"].keys() == {"8", "16"}
    assert len(results["regulariser"]["seconds_of_a_run"]) == 5 and "| reduced to N = 4 |" in output
    assert (tmp_path / "analysis.png").stat().st_size > 5_000


REDUCTIONS = """
    --seeds 0 --criteria output magnitude --max_steps 20 --batches 1 --curve 1 2 --validation_sequences 8
    --hidden_size 16 --num_hidden_layers 2 --vocab_size 300 --processes 1
""".split()


def test_every_reduction_is_compared_and_a_finished_comparison_only_reported(tmp_path):
    command = ["compare_reductions", *REDUCTIONS, "--texts", "bible:16", "--output_dir", tmp_path]
    output = run_script(*command).stdout
    result = json.loads((tmp_path / "bible-16-0.json").read_text())
    found = {(e["criterion"], e["remedy"], e["divisor"]) for e in result["rises"]}
    remedies = ("none", "compensate", "compensate + refit")
    assert found == {(c, r, d) for c in ("output", "magnitude") for r in remedies for d in (2, 4, 8, 16)}
    assert len(result["curve"]) == 6 and len(result["predictions"]) == 4 * 3
    assert (tmp_path / "reductions.md").read_text() in output
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("rises", "calibration", "predictions"))
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    assert run_script(*command).stdout == output
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_reductions_of_a_mamba2_are_compared_in_both_bases(tmp_path):
    options = [*REDUCTIONS, "--model_type", "mamba2", "--texts", "bible:16", "--criteria", "output", "balanced"]
    run_script("compare_reductions", *options, "--refitted", "balanced", "--curve", "1", "--output_dir", tmp_path)
    result = json.loads((tmp_path / "bible-16-0.json").read_text())
    found = {(e["criterion"], e["remedy"]) for e in result["rises"]}
    assert found == {("output", "none"), ("balanced", "none"), ("balanced", "refit")}
    table = (tmp_path / "reductions.md").read_text()
    assert "| output | none |" in table and "| balanced | refit |" in table and "| output | refit |" not in table
    assert len(result["output_errors"]) == 2 * 4
    assert all(0.2 < e["predicted"] / e["measured"] < 5 for e in result["output_errors"])
    assert (tmp_path / "output-errors.png").stat().st_size > 10_000
