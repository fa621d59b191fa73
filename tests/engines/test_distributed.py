"""Two processes train what one would on their joined batch: through the cuts, and bit-identically to each other.

And what goes wrong in one of them stops all of them, with one clear error.
"""

import json
import time

import pytest
import torch
from compared_runs import PROCESSES, launching, running_alone
from conftest import ROOT, assert_identical, build_model, weights_of
from distributed_loop import (
    batches_of,
    build_lru,
    measured,
    refitted,
    scored_by_gradients,
    train_and_cut,
    truncate_in_training,
)
from distributed_training import ENGINES, SLOW, train
from processes import run_in_processes

TRAINING, LOOP = (ROOT / "tests" / "engines" / f"distributed_{name}.py" for name in ("training", "loop"))


launched = launching(TRAINING, ENGINES, lambda engine, variant: variant in SLOW[engine])
alone = running_alone()

BOUNDS = {"bf16": 2e-3, "fp16 hook": 5e-3, "compiled": 2e-6}  # the compiler takes sums in an order of its own
VARIANTS = [
    pytest.param(engine, name, marks=pytest.mark.slow if name in SLOW[engine] else ())
    for engine in ENGINES
    for name in ENGINES[engine]
    if "rollback" not in name
]


@pytest.mark.parametrize(("engine", "variant"), VARIANTS)
def test_weights_are_those_of_one_process_after_every_step(launched, alone, engine, variant):
    expected, folder = alone(ENGINES[engine][variant]), launched(engine, variant in SLOW[engine])
    first, second = (torch.load(folder / f"{engine} {variant} {rank}.pt") for rank in range(PROCESSES))
    sizes = [weights["backbone.layers.0.mixer.A_log"].shape[1] for weights in first]
    assert sizes[:12] == [16, 16, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4]
    assert sizes[-1] == (sizes[12 + 4] if "trainings" in ENGINES[engine][variant] else 8 if "best" in variant else 4)
    for weights, same, reference in zip(first, second, expected, strict=True):
        assert_identical(weights, same)
        bound = BOUNDS.get(variant, 1e-6)
        assert max((weights[name] - reference[name]).abs().max() for name in reference) < bound


@pytest.fixture(scope="module")
def looped(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("loop")
    dataset.save_to_disk(folder / "dataset")
    for engine in ENGINES:
        started = time.perf_counter()
        run_in_processes(PROCESSES, LOOP, folder, engine)
        assert time.perf_counter() - started < 120  # nobody waits for a process that failed
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_of_ones_own_trains_as_in_one_process(looped, dataset, engine):
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
    train_and_cut(model, optimizer, batches_of(dataset, 0, 1, 8), lambda loss: loss.backward())
    first, second = (torch.load(looped / f"{engine} loop {rank}.pt") for rank in range(PROCESSES))
    reference = weights_of(model)
    assert_identical(first, second)
    assert reference["backbone.layers.0.mixer.A_log"].shape[1] == 8
    assert max((first[name] - reference[name]).abs().max() for name in reference) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_time_invariant_model_is_truncated_as_in_one_process(looped, engine):
    model = build_lru()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
    truncate_in_training(model, optimizer, 0, 1, torch.Tensor.backward)
    first, second = (torch.load(looped / f"{engine} lru {rank}.pt") for rank in range(PROCESSES))
    assert_identical(first, second)
    probe = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    expected = model(input_values=probe).logits
    assert model.config.state_sizes == [8, 8]
    model.load_state_dict(first)  # states may stand in another order
    assert (model(input_values=probe).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_measured_on_the_data_of_all(looped, dataset, engine):
    expected = measured(build_model(), batches_of(dataset, 0, 1, 8))
    assert abs(expected[1] - expected[0]) > 1e-3  # the cut matters
    for rank in range(PROCESSES):
        found = json.loads((looped / f"{engine} loop {rank}.json").read_text())["measured"]
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_states_are_refitted_on_the_data_of_all(looped, dataset, engine):
    plain, fitted = refitted(build_model(), batches_of(dataset, 0, 1, 8))
    assert fitted < 0.8 * plain  # a refit matters
    found = [json.loads((looped / f"{engine} loop {rank}.json").read_text())["refitted"] for rank in range(PROCESSES)]
    assert found[0] == found[1] == pytest.approx([plain, fitted], abs=1e-3)


def test_gradients_are_those_of_the_data_of_all_or_refused(looped, dataset):
    expected = scored_by_gradients(build_model(), batches_of(dataset, 0, 1, 8))
    for rank in range(PROCESSES):
        found = {
            engine: json.loads((looped / f"{engine} loop {rank}.json").read_text())["gradients"] for engine in ENGINES
        }
        assert found["ddp"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert "a criterion that needs gradients, such as 'taylor', cannot have them under FSDP2" in found["fsdp"]


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_on_the_wrapper_outlive_a_cut(looped, engine):
    for rank in range(PROCESSES):
        calls = json.loads((looped / f"{engine} loop {rank}.json").read_text())["calls of the hook"]
        # FSDP2 wraps nothing: the hook sits on the model itself, and sees the analysis, too.
        assert calls == 8 if engine == "ddp" else calls > 8


@pytest.mark.parametrize("engine", ENGINES)
def test_where_one_process_has_fewer_batches_all_take_as_many(looped, engine):
    for rank in range(PROCESSES):
        fewer, as_few = json.loads((looped / f"{engine} loop {rank}.json").read_text())["fewer"]
        assert fewer == as_few


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("data", "the calibration data ended after 1 batches, 2 are needed"),
        ("config", "the processes were given different configurations"),
        ("plan", "this process was given another plan than the first"),
        ("weights", "layer 0 A_log holds NaN or Inf"),
        ("activations", "the state scores are not finite"),
    ],
)
def test_a_fault_in_one_process_stops_all_with_one_error(looped, engine, fault, message):
    errors = [json.loads((looped / f"{engine} loop {rank}.json").read_text())[fault] for rank in range(PROCESSES)]
    assert all(message in error for error in errors)
    if fault != "activations":  # there the sums over all processes are not finite, so each sees it by itself
        assert errors[0].startswith("process 1 of 2 failed, so none went on. ValueError: ")


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_rollback_the_run_is_that_of_a_model_never_cut(launched, engine, storage):
    for rank in range(PROCESSES):
        names = (f"rollback {storage}", "rollback of a run never cut")
        undone, never_cut = (torch.load(launched(engine) / f"{engine} {name} {rank}.pt") for name in names)
        sizes = [weights["backbone.layers.0.mixer.A_log"].shape[1] for weights in undone]
        assert sizes == [16, 16, 8, 8] + [16] * 9
        for left, right in zip(undone[4:], never_cut[4:], strict=True):
            assert_identical(left, right)


@pytest.mark.parametrize(
    ("engine", "variant"), [("ddp", "saving"), ("fsdp", "full"), ("fsdp", "sharded"), ("fsdp", "per layer")]
)
def test_a_run_resumes_exactly_in_new_processes(launched, engine, variant):
    folder = launched(engine)
    checkpoint = folder / engine / variant / "checkpoint-4"
    run_in_processes(PROCESSES, TRAINING, folder, engine, f"{variant}@{checkpoint}")
    for rank in range(PROCESSES):
        uninterrupted, resumed = (torch.load(folder / f"{engine} {variant}{w} {rank}.pt") for w in ("", " resumed"))
        for reference, weights in zip(uninterrupted[4:], resumed, strict=True):
            assert_identical(reference, weights)


def test_a_checkpoint_of_two_processes_resumes_in_one_and_the_other_way_round(launched, dataset, tmp_path):
    _, one_process = train(tmp_path / "one", dataset, save_strategy="steps", save_steps=4)
    folder, checkpoint = launched("ddp"), tmp_path / "one" / "checkpoint-4"
    run_in_processes(PROCESSES, TRAINING, folder, "ddp", f"saving@{checkpoint}")
    resumed = torch.load(folder / "ddp saving resumed 0.pt")
    _, alone = train(tmp_path / "alone", dataset, resume_from=folder / "ddp" / "saving" / "checkpoint-4")
    for weights in (resumed, alone):
        assert len(weights) == 9  # eight steps, and at the end
        for later, reference in zip(weights, one_process[4:], strict=True):
            assert max((later[name] - reference[name]).abs().max() for name in reference) < 1e-6
