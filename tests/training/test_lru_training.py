"""An LRU in Trainer's hands: it is cut layer by layer, observed without being disturbed, and resumed exactly."""

import itertools
import json

import pytest
import torch
from conftest import FADING, assert_identical, build_lru, build_trainer, losses_of, random_state, weights_of
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import load_history

N = 16
SCHEDULE = {"start": 0.0, "end": 0.5, "events": 2}  # of 12 steps: after 3 and 6


def lru_run(folder, labelled, seed=0, callback=True, resume=None, monitor_steps=2, tolerance=0.03, **options):
    schedule = CompreSSMSchedule(**SCHEDULE, monitor_steps=monitor_steps)
    callbacks = [CompreSSMCallback(CompreSSMConfig(tolerance=tolerance), schedule)] if callback else []
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "learning_rate": 3e-3} | options
    model = build_lru(seed, **FADING)
    model.model.layers[0].mixer.C.data[:, 10:] *= 0.01
    trainer = build_trainer(folder, labelled, callbacks, model=model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callbacks[0].history if callback else None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, labelled):
    """(folder, trainer, history) of a run that cuts twice and observes every second step."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, *lru_run(folder, labelled)


def test_a_run_cuts_each_layer_at_its_steps(uninterrupted):
    folder, trainer, history = uninterrupted
    sizes = [event.state_sizes_after for event in history.events]
    assert history.steps == [3, 6] and all(event.is_cut for event in history.events)
    assert all(len(set(after)) == 2 for after in sizes)
    assert trainer.model.config.state_size == sizes[1]
    for step, expected in ((2, [N, N]), (3, sizes[0]), (5, sizes[0]), (6, sizes[1]), (12, sizes[1])):
        assert check_checkpoint(folder / f"checkpoint-{step}") == dict(enumerate(expected))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-12")
    assert_identical(weights_of(loaded), weights_of(trainer.model))


@pytest.mark.parametrize("checkpoint", [2, 3, 4, 8])  # before, at, between and after the cuts
def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path, labelled, uninterrupted, checkpoint):
    folder, trainer, history = uninterrupted
    resume = str(folder / f"checkpoint-{checkpoint}")
    resumed, resumed_history = lru_run(tmp_path, labelled, seed=1, resume=resume)
    assert losses_of(resumed) == losses_of(trainer)
    assert_identical(weights_of(resumed.model), weights_of(trainer.model))
    assert resumed.model.config.state_size == trainer.model.config.state_size
    for kind in ("events", "observations"):
        for left, right in zip(getattr(history, kind), getattr(resumed_history, kind), strict=True):
            assert left.step == right.step and getattr(left, "movement", 0) == getattr(right, "movement", 0)
            assert all(map(torch.equal, left.hankel_singular_values, right.hankel_singular_values))


def test_a_second_training_starts_its_observations_anew(tmp_path, labelled):
    trainer, _ = lru_run(tmp_path, labelled, tolerance=1e-9, save_strategy="no")
    trainer.train()
    history = trainer.pop_callback(CompreSSMCallback).history
    assert [entry.movement is None for entry in history.observations] == [True] + [False] * 5


def test_a_run_that_is_only_watched_is_bit_identical_to_one_that_is_not(tmp_path, labelled):
    plain, _ = lru_run(tmp_path / "plain", labelled, callback=False)
    plain_random_state = random_state()
    watched, history = lru_run(tmp_path / "watched", labelled, monitor_steps=1, tolerance=1e-9)
    assert random_state() == plain_random_state
    assert [event.is_cut for event in history.events] == [False, False] and len(history.observations) == 12
    assert losses_of(watched) == losses_of(plain)
    assert_identical(weights_of(watched.model), weights_of(plain.model))


def test_observations_say_how_far_the_singular_values_moved_and_start_again_after_a_cut(uninterrupted):
    folder, _, history = uninterrupted
    observations = history.observations
    assert [observation.step for observation in observations] == [2, 4, 6, 8, 10, 12]
    measured = [observation.movement is not None for observation in observations]
    assert measured == [False, False, True, False, True, True]
    for last, now in itertools.pairwise(observations):
        assert (now.weyl_bound is None) == (now.movement is None) == (now.state_sizes != last.state_sizes)
        for layer, movement in enumerate(now.movement or []):
            moved = now.hankel_singular_values[layer] - last.hankel_singular_values[layer]
            assert 0 < movement == moved.abs().max() <= now.weyl_bound[layer] * (1 + 1e-9)

    read = load_history(folder / "checkpoint-12")
    assert read.to_dict() == history.to_dict()
    spectra = load_file(folder / "checkpoint-12" / "hsv.safetensors")
    assert len(spectra) == 2 * (2 + 6)
    assert torch.equal(spectra["observation.3.layer.1"], observations[3].hankel_singular_values[1])
    content = json.loads((folder / "checkpoint-12" / "compressm.json").read_text())
    assert [entry["movement"] for entry in content["observations"]] == [entry.movement for entry in observations]
    assert "hankel_singular_values" not in content["observations"][0]


def test_observations_and_cuts_are_announced(tmp_path, labelled, capsys):
    _, history = lru_run(tmp_path, labelled, save_strategy="no")
    printed = capsys.readouterr().out
    for event, last in zip(history.events, ([N, N], history.events[0].state_sizes_after), strict=True):
        before, after = ("-".join(map(str, sorted(set(sizes)))) for sizes in (last, event.state_sizes_after))
        assert f"CompreSSM, step {event.step} of 12: state size {before} → {after}\n" in printed
    lines = {line.split(",")[1].split(" of")[0]: line for line in printed.splitlines() if "singular values" in line}
    assert lines[" step 2"].endswith("step 2 of 12: N 16")
    largest = history.observations[2].hankel_singular_values
    movement, bound = (
        max(distance / float(sigma[0]) for distance, sigma in zip(distances, largest, strict=True))
        for distances in (history.observations[2].movement, history.observations[2].weyl_bound)
    )
    assert lines[" step 6"].endswith(f"moved by at most {movement:.2%} of σ_1 (Weyl's bound {bound:.2%})")
