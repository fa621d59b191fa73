"""Balanced truncation of LRU models: exact, from the weights alone, per layer, in training and out of it."""

import copy
import itertools
import json
import math

import pytest
import scipy.linalg
import torch
from conftest import assert_identical, build_model, build_trainer, losses_of, weights_of
from datasets import Dataset
from safetensors.torch import load_file
from test_lru import build_lru, label_of
from test_training import random_state
from transformers import Adafactor, AutoModelForSequenceClassification, set_seed

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, analyze, compress, parameter_groups
from hf_compressm.analysis.allocation import choose_sizes
from hf_compressm.analysis.losses import LossMeter
from hf_compressm.analysis.time_invariant import TimeInvariantAnalysis
from hf_compressm.architectures.family import state_layers, state_sizes
from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.history import load_history
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state
from hf_compressm.theory.hankel import error_bound, gramians, hankel_singular_values
from hf_compressm.training.monitor import StateMonitor

N = 16
FADING = {"r_min": 0.0, "r_max": 0.9}
RESIZED = ("nu_log", "theta_log", "gamma_log", "B", "C")
SCHEDULE = {"start": 0.0, "end": 0.5, "events": 2}  # of 12 steps: after 3 and 6


@pytest.fixture(scope="session")
def data(blocks) -> list[dict]:
    """Ten labelled batches of sixteen, the first one shorter."""
    labels = label_of(blocks)
    return [{"input_ids": blocks[i], "labels": labels[i]} for i in torch.arange(6, 160).split([10] + [16] * 9)]


@pytest.fixture(scope="session")
def labelled(blocks) -> Dataset:
    return Dataset.from_dict({"input_ids": blocks[:1000].tolist(), "labels": label_of(blocks)[:1000].tolist()})


@pytest.fixture(scope="session")
def learned_weights(blocks) -> dict[str, torch.Tensor]:
    """Trained until the loss depends on the states; then some states of the first layer are made weak."""
    model, labels = build_lru(hidden_dropout_prob=0.0, **FADING), label_of(blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for i in torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).split(16)[:150]:
        train_step(model, optimizer, {"input_ids": blocks[i], "labels": labels[i]})
    model.model.layers[0].mixer.C.data[:, 10:] *= 0.01
    return weights_of(model)


@pytest.fixture
def model(learned_weights):
    model = build_lru(**FADING)
    model.load_state_dict(learned_weights)
    return model.eval()


def train_step(model, optimizer, batch) -> None:
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def mean_loss(model, batches) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() * len(batch["labels"]) for batch in batches]
    return sum(losses) / sum(len(batch["labels"]) for batch in batches)


@torch.no_grad()
def systems_of(model) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(tensor.clone() for tensor in mixer.system()) for mixer in state_layers(model).values()]


def gains(*systems: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Largest singular value of G_1 - G_2 - … on a grid of frequencies that has all resonances."""
    phases = torch.cat([torch.linspace(0, 2 * math.pi, 400, dtype=torch.float64)] + [s[0].angle() for s in systems])
    z = torch.polar(torch.ones_like(phases), phases)
    responses = [(C / (z[:, None, None] - eigenvalues)) @ B for eigenvalues, B, C in systems]
    return torch.linalg.matrix_norm(responses[0] - sum(responses[1:]), 2) if responses[1:] else responses[0]


def tail_share(sigma: torch.Tensor, rank: int) -> float:
    return float(sigma[rank:].sum() / sigma.sum())


def test_the_spectrum_is_that_of_the_dense_lyapunov_equations(model):
    report = analyze(model, None, CompreSSMConfig(target_state_size=5))
    for index, (eigenvalues, B, C) in enumerate(systems_of(model)):
        expected = hankel_singular_values(*gramians(torch.diag(eigenvalues), B, C))
        assert report.scores[index].shape == (N,) and (report.scores[index].diff() <= 0).all()
        torch.testing.assert_close(report.hankel_singular_values[index], expected, rtol=1e-6, atol=1e-6)


def test_an_analysis_of_the_weights_needs_no_data_and_changes_nothing(model):
    model.train()
    model.model.layers[0].eval()
    model(input_ids=torch.arange(8).view(1, 8), labels=torch.tensor([1])).loss.backward()
    modes = [module.training for module in model.modules()]
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    before, config, random = weights_of(model), model.config.to_dict(), random_state()
    parameters = list(model.parameters())
    report = analyze(model, None, CompreSSMConfig(tolerance=0.05, selection="random"))

    assert random_state() == random and model.config.to_dict() == config
    assert [module.training for module in model.modules()] == modes
    assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
    assert_identical(weights_of(model), before)
    assert_identical({name: parameter.grad for name, parameter in model.named_parameters()}, gradients)
    assert (report.criterion, report.compensate, report.tokens, report.measuring_seconds) == ("hankel", False, 0, 0)
    assert (report.loss_before, report.loss_after, report.single_layer_loss_change) == (None, None, {})
    assert report.state_sizes_before == {0: N, 1: N} and report.is_cut and not report.applied
    assert "score discarded" in str(report) and "loss" not in str(report)


@pytest.mark.parametrize("selection", ["largest", "random"])
def test_the_measured_losses_are_those_of_the_compressed_model(model, data, selection):
    config = CompreSSMConfig(target_state_size=3, selection=selection)
    report = analyze(model, data, config)
    assert report.loss_before == pytest.approx(mean_loss(model, data[:4]), abs=1e-6)
    assert "measured loss" in str(report)
    for kept, cut in ((0, 1), (1, 0)):
        alone = copy.deepcopy(model)
        compress(alone, analyze(alone, None, CompreSSMConfig(**vars(config) | {"skip_layers": [kept]})))
        sequences = [{name: value[::2] for name, value in data[0].items()}]  # for two layers
        change = mean_loss(alone, sequences) - mean_loss(model, sequences)
        assert report.single_layer_loss_change[cut] == pytest.approx(change, abs=1e-5)

    event = compress(model, report)
    assert report.loss_after == pytest.approx(mean_loss(model, data[:4]), abs=1e-5)
    assert abs(report.loss_after - report.loss_before) > 1e-4
    assert (event.loss_before, event.loss_after, event.criterion) == (report.loss_before, report.loss_after, "hankel")


def test_losses_of_a_number_are_weighted_by_the_size_of_their_batches(data):
    model = build_lru(num_labels=1).eval()
    for shape in ((-1,), (-1, 1)):
        batches = [batch | {"labels": batch["labels"].float().view(shape)} for batch in data]
        report = analyze(model, batches, CompreSSMConfig(target_state_size=3))
        assert report.loss_before == pytest.approx(mean_loss(model, batches[:4]), abs=1e-6)


def test_plans_with_the_same_largest_size_are_measured_each(model, data):
    analysis = TimeInvariantAnalysis(model, CompreSSMConfig(tolerance=0.1))
    plans = [analysis.plan({0: first, 1: second}) for first, second in ((N, 3), (3, N), (3, 3), (N, N))]
    with torch.no_grad():
        meter = LossMeter(model, data[:2], analysis.overrides)
        losses = [meter.loss(plan) for plan in plans]
        assert losses == [LossMeter(model, data[:2], analysis.overrides).loss(plan) for plan in plans]
    assert len(set(losses)) == 4 and losses[3] == pytest.approx(mean_loss(model, data[:2]), abs=1e-6)


@pytest.mark.parametrize("goal", [{"target_state_size": 1}, {"target_state_size": 6}, {"tolerance": 0.05}])
def test_every_cut_layer_keeps_to_the_error_bound_at_all_frequencies(model, goal):
    whole, D = systems_of(model), [mixer.D.clone() for mixer in state_layers(model).values()]
    report = analyze(model, None, CompreSSMConfig(**goal))
    compress(model, report)
    for index, mixer in state_layers(model).items():
        sigma, rank = report.scores[index], mixer.state_size
        reduced = systems_of(model)[index]
        error, scale = (
            gains(whole[index], reduced).max(),
            gains(whole[index], (reduced[0], 0 * reduced[1], reduced[2])),
        )
        assert rank == len(reduced[0]) < N and torch.equal(mixer.D, D[index])
        assert 0.98 * sigma[rank] <= error <= error_bound(sigma, rank) + 1e-5 * scale.max()


def test_two_cuts_keep_to_the_sum_of_their_bounds(model):
    whole, bounds = systems_of(model), [0.0, 0.0]
    for size in (9, 4):
        report = analyze(model, None, CompreSSMConfig(target_state_size=size))
        bounds = [bound + error_bound(report.scores[i], size) for i, bound in enumerate(bounds)]
        compress(model, report)
        assert model.config.state_size == size
    for before, after, bound in zip(whole, systems_of(model), bounds, strict=True):
        assert gains(before, after).max() <= bound + 1e-4


def test_each_layer_gets_the_smallest_rank_within_the_tolerance_or_all_the_largest(model):
    config = CompreSSMConfig(tolerance=0.05)
    report = analyze(model, None, config)
    sizes = report.state_sizes
    assert sizes[0] != sizes[1]
    for index, size in sizes.items():
        sigma = report.scores[index]
        assert tail_share(sigma, size) <= 0.05 < tail_share(sigma, size - 1)
        assert report.score_discarded[index] == pytest.approx(tail_share(sigma, size))
        assert report.kept_states[index].tolist() == list(range(size))
    assert analyze(model, None, CompreSSMConfig(tolerance=0.05, allocation="per_layer")).state_sizes == sizes
    uniform = analyze(model, None, CompreSSMConfig(tolerance=0.05, allocation="uniform")).state_sizes
    assert uniform == dict.fromkeys((0, 1), max(sizes.values()))


def test_the_gate_keeps_a_layer_whole_unless_five_percent_of_it_goes():
    scores = {
        index: torch.tensor([1.0] * rank + [1e-9] * (20 - rank), dtype=torch.float64)
        for index, rank in enumerate((20, 19, 18, 5))
    }
    chosen = choose_sizes(CompreSSMConfig(tolerance=1e-6), scores, "per_layer", None)
    assert list(chosen.values()) == [20, 20, 18, 5]


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ({"target_state_size": 6}, [6, 6]),
        ({"target_state_size": 12}, [12, 9]),
        ({"target_state_size": 16}, [16, 9]),
        ({"target_state_size": 6, "skip_layers": [0]}, [16, 6]),
        ({"cut_fraction": 0.25}, [12, 7]),
        ({"cut_fraction": 0.25, "multiple_of": 4}, [12, 8]),
        ({"cut_fraction": 0.25, "min_state_size": 11}, [12, 9]),
        ({"cut_fraction": 0.01, "skip_layers": [1]}, [16, 9]),
        ({"tolerance": 0.999, "multiple_of": 4}, [4, 4]),
        ({"tolerance": 0.999, "min_state_size": 10}, [10, 9]),
        ({"tolerance": 0.999, "skip_layers": [1]}, [1, 9]),
        ({"tolerance": 0.999, "min_reduction": 0.9}, [1, 9]),
        ({"tolerance": 1e-9}, [16, 9]),
    ],
)
def test_the_sizes_are_what_the_configuration_asks_for(goal, expected):
    given = [16, 9]
    model = build_lru(state_size=given)
    report = analyze(model, None, CompreSSMConfig(**goal))
    compress(model, report)
    assert given == [16, 9]
    assert list(report.state_sizes.values()) == list(state_sizes(model).values()) == expected
    assert model.config.state_sizes == expected
    assert model.config.state_size == (expected[0] if len(set(expected)) == 1 else expected)


@pytest.mark.parametrize("allocation", ["uniform", "per_layer"])
def test_a_loss_budget_is_kept_and_the_next_smaller_candidate_breaks_it(model, data, allocation):
    options = {"allocation": allocation, "min_reduction": 0.0}
    budget = 0.005
    report = analyze(model, data, CompreSSMConfig(loss_budget=budget, **options))
    allowed = report.loss_before + budget
    assert report.is_cut and report.loss_after <= allowed
    if allocation == "uniform":
        assert report.state_sizes[0] == report.state_sizes[1]
        smaller = CompreSSMConfig(target_state_size=report.state_sizes[0] - 1, **options)
    else:  # the next tolerance at which a layer loses a state
        shares = [tail_share(report.scores[i], size - 1) for i, size in report.state_sizes.items() if size > 1]
        smaller = CompreSSMConfig(tolerance=min(shares) + 1e-12, **options)
    assert sum(analyze(model, None, smaller).state_sizes.values()) < sum(report.state_sizes.values())
    assert analyze(model, data, smaller).loss_after > allowed


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("options", [{}, {"multiple_of": 4}, {"min_state_size": 5}])
def test_a_loss_budget_can_choose_any_allowed_size_of_a_layer(uniform, options):
    for seed in range(10):
        scores = {0: torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}
        for budget in range(1, N):
            config = CompreSSMConfig(loss_budget=budget, min_reduction=0.0, **options)
            chosen = choose_sizes(config, scores, "uniform" if uniform else "per_layer", lambda sizes: N - sizes[0])
            assert chosen == {0: config.round_up(N - budget)}


def test_a_loss_budget_drops_states_and_layers_that_have_no_score():
    scores = {0: torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0]).double(), 1: torch.zeros(7).double()}
    for size in (3, 2, 1):
        config = CompreSSMConfig(loss_budget=3.5 - size)
        chosen = choose_sizes(config, scores, "per_layer", lambda sizes: max(0, 3 - sizes[0]))
        assert chosen == {0: size, 1: 1}


def test_a_loss_budget_is_kept_by_the_sizes_behind_the_gate():
    """The cut that the gate takes back from layer 0 had lowered the loss."""
    scores = {layer: torch.tensor([1.0] * rank + [1e-3] * (20 - rank)).double() for layer, rank in ((0, 19), (1, 8))}

    def loss_of(sizes):
        return 0.014 * (sizes[1] < 20) - 0.01 * (sizes[0] < 20) + (sizes[0] < 19 or sizes[1] < 8)

    chosen = choose_sizes(CompreSSMConfig(loss_budget=0.005), scores, "per_layer", loss_of)
    assert loss_of(chosen) <= 0.005


def test_the_largest_singular_values_matter_most(model, data):
    after = {}
    for selection in ("largest", "smallest", "random"):
        report = analyze(model, data, CompreSSMConfig(target_state_size=6, selection=selection))
        after[selection] = report.loss_after
        assert all(len(keep) == 6 for keep in report.kept_states.values())
        assert all((keep.diff() > 0).all() for keep in report.kept_states.values())
        if selection == "smallest":
            assert all(keep.tolist() == list(range(10, 16)) for keep in report.kept_states.values())
    assert after["largest"] < min(after["random"], after["smallest"]) - 0.02


def test_a_random_selection_follows_from_the_seed_and_differs_between_layers(model):
    def keep(seed):
        config = CompreSSMConfig(target_state_size=6, selection="random", calibration_seed=seed)
        return [tuple(keep.tolist()) for keep in analyze(model, None, config).kept_states.values()]

    assert keep(0) == keep(0)
    assert len({*keep(0), *keep(1)}) == 4


@pytest.mark.parametrize("goal", [{"skip_layers": [0]}, {"skip_layers": [1]}, {"min_reduction": 0.35}])
def test_a_layer_that_is_not_cut_stays_bit_identical(model, goal):
    before = weights_of(model)
    compress(model, analyze(model, None, CompreSSMConfig(**{"tolerance": 0.05} | goal)))
    sizes = state_sizes(model)
    assert sorted(sizes.values())[0] < N == sorted(sizes.values())[1]
    untouched = [f"model.layers.{index}." for index in sizes if sizes[index] == N]
    after = weights_of(model)
    same = {name for name in before if before[name].shape == after[name].shape and before[name].equal(after[name])}
    cut = {f"model.layers.{index}.mixer.{name}" for index in sizes if sizes[index] < N for name in RESIZED}
    assert len(untouched) == 1 and same == before.keys() - cut


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.AdamW,
        torch.optim.SGD,
        torch.optim.Adafactor,
        Adafactor,
    ],
)
def test_the_optimizer_follows_a_cut(model, data, kind):
    """Resized tensors keep their positions and start afresh, all others keep their moments, and all go on learning."""
    options = {torch.optim.SGD: {"momentum": 0.9}, Adafactor: {"relative_step": False, "scale_parameter": False}}
    parameters = list(model.parameters())
    groups = [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=1e-2, **options.get(kind, {}))
    for batch in data[:2]:
        train_step(model, optimizer, batch)

    def names_by_position() -> list[list[str]]:
        names = {parameter: name for name, parameter in model.named_parameters()}
        return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    def states() -> dict[str, dict]:
        return {name: copy.deepcopy(dict(optimizer.state[p])) for name, p in model.named_parameters()}

    positions, before = names_by_position(), states()
    resized = {f"model.layers.1.mixer.{name}" for name in RESIZED}
    compress(model, analyze(model, None, CompreSSMConfig(tolerance=0.05, skip_layers=[0])), optimizer)
    assert names_by_position() == positions
    torch.testing.assert_close(states(), {n: {} if n in resized else s for n, s in before.items()}, rtol=0, atol=0)

    weights = weights_of(model)
    train_step(model, optimizer, data[2])
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, weights[name])]
    for name, state in states().items():
        assert "step" not in state or int(state["step"]) == (1 if name in resized else 3)


def test_a_waiting_gradient_stays_with_its_weight_and_goes_with_a_resized_one(model, data):
    model(**data[0]).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    compress(model, analyze(model, None, CompreSSMConfig(target_state_size=6, skip_layers=[0])))
    for name, parameter in model.named_parameters():
        if name in {f"model.layers.1.mixer.{resized}" for resized in RESIZED}:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, gradients[name])


def test_a_plan_that_fails_in_the_last_layer_changes_nothing(model):
    report = analyze(model, None, CompreSSMConfig(target_state_size=5))
    report.plan[1].tensors["B"][0, 0, 0] = float("inf")
    before, parameters = weights_of(model), list(model.parameters())
    with pytest.raises(ValueError, match="layer 1: the resized B would hold NaN or Inf; nothing was changed"):
        compress(model, report)
    assert_identical(weights_of(model), before)
    assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
    assert model.config.state_size == N and not report.applied


def test_a_cut_model_is_an_ordinary_checkpoint(tmp_path, model, data):
    compress(model, analyze(model, None, CompreSSMConfig(tolerance=0.05)))
    sizes = list(state_sizes(model).values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.state_size == sizes and check_checkpoint(tmp_path) == dict(enumerate(sizes))
    assert torch.equal(loaded(input_ids=data[0]["input_ids"]).logits, model(input_ids=data[0]["input_ids"]).logits)
    assert analyze(loaded, None, CompreSSMConfig(tolerance=0.05)).state_sizes_before == dict(enumerate(sizes))


def test_a_model_adopts_any_sizes_layer_by_layer_from_the_weights_it_is_given():
    source, model = build_lru(state_size=[N - 1, N + 1]), build_lru(seed=1)
    handle = adopt_checkpoint_sizes(model)
    model.load_state_dict(source.state_dict())
    assert model.config.state_size == [N - 1, N + 1]
    assert_identical(weights_of(model), weights_of(source))
    handle.remove()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(build_lru().state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_config(folder, state_size=[9, 5]), "layer 0 has 5 states, config.json says .* 9"),
        (lambda folder: edit_config(folder, state_size=5), "layer 1 has 9 states, config.json says .* 5"),
        (lambda folder: edit_config(folder, state_size=[5, 9, 9]), r"gives 2 layers the state sizes"),
        (lambda folder: edit_config(folder, model_type="gpt2"), "type 'gpt2'; supported: mamba, compressm_mamba, lru"),
        (lambda folder: cut_file(folder / "model.safetensors"), "truncated or damaged"),
        (lambda folder: cut_file(folder / "config.json"), "truncated or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, message):
    build_lru(state_size=[5, 9]).save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path) == {0: 5, 1: 9}
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path)


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_file(path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"tolerance": 0.1, "criterion": "output"}, "criterion = 'output'; the states of model type 'lru'"),
        ({"target_state_size": 17}, "target_state_size = 17 is above the model's 16 states"),
        ({"tolerance": 0.1, "skip_layers": [2]}, r"skip_layers = \[2\]; allowed: some of the layers \[0, 1\]"),
        ({"tolerance": 0.1, "skip_layers": [-1]}, r"skip_layers = \[-1\]"),
        ({"tolerance": 0.1, "skip_layers": [0, 1]}, r"skip_layers = \[0, 1\]"),
        ({"loss_budget": 0.1}, "batches = None; a loss budget needs batches"),
    ],
)
def test_a_configuration_that_does_not_fit_an_lru_is_refused(goal, message):
    with pytest.raises(ValueError, match=message):
        analyze(build_lru(), None, CompreSSMConfig(**goal))


@pytest.mark.parametrize(
    ("goal", "given", "message"),
    [
        ({"tolerance": 0.1}, False, "batches = None; a model of type 'mamba' is analysed on batches"),
        ({"tolerance": 0.1, "skip_layers": [0]}, True, r"skip_layers = \[0\]; allowed: .* a size of its own"),
    ],
)
def test_what_only_an_lru_can_do_is_refused_for_a_mamba(batches, goal, given, message):
    with pytest.raises(ValueError, match=message):
        analyze(build_model(), batches if given else None, CompreSSMConfig(**goal))


def test_weights_that_diverged_and_reports_of_another_model_are_refused(model, data):
    report = analyze(model, None, CompreSSMConfig(target_state_size=6))
    with pytest.raises(ValueError, match=r"made for state sizes .* the model has \{0: 5, 1: 9\}"):
        compress(build_lru(state_size=[5, 9]), report)
    compress(model, report)
    with pytest.raises(ValueError, match="applied already"):
        compress(model, report)
    with pytest.raises(ValueError, match="calibration batch 0 has .*labels"):
        analyze(model, [{"input_ids": batch["input_ids"]} for batch in data], CompreSSMConfig(tolerance=0.1))
    with pytest.raises(ValueError, match=r"layer 0 nu_log is trained in torch\.bfloat16"):
        half = build_lru().bfloat16()
        report = analyze(half, None, CompreSSMConfig(target_state_size=6))
        compress(half, report, torch.optim.SGD(half.parameters()))
    model.model.layers[1].mixer.theta_log.data[3] = float("nan")
    with pytest.raises(ValueError, match="layer 1 theta_log holds NaN or Inf"):
        analyze(model, None, CompreSSMConfig(tolerance=0.1))


def test_a_layer_asked_for_more_states_than_it_has_in_truth_gets_idle_ones(model, data):
    """Repeated eigenvalues and states that nobody sees: 16 states that do the work of eight."""
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        for name in ("nu_log", "theta_log", "gamma_log"):
            mixer.get_parameter(name)[:4] = mixer.get_parameter(name)[4:8]
        mixer.B[:4] = 2 * mixer.B[4:8]
        mixer.C[:, 12:] = 0
    logits = model(input_ids=data[1]["input_ids"]).logits
    report = analyze(model, None, CompreSSMConfig(target_state_size=11, skip_layers=[1]))
    compress(model, report)
    assert mixer.state_size == 11 and all(torch.isfinite(parameter).all() for parameter in mixer.parameters())
    assert ((mixer.C == 0).all((0, 2)) & (mixer.B == 0).all((1, 2))).sum() == 3
    torch.testing.assert_close(model(input_ids=data[1]["input_ids"]).logits, logits, rtol=0, atol=1e-5)


def test_a_layer_without_outputs_is_cut_to_the_smallest_size(model, data):
    model.model.layers[0].mixer.C.data.zero_()
    logits = model(input_ids=data[1]["input_ids"]).logits
    report = analyze(model, data, CompreSSMConfig(loss_budget=1e-4, skip_layers=[1]))
    assert report.state_sizes == {0: 1, 1: N} and math.isfinite(report.score_discarded[0])
    event = compress(model, report)
    assert math.isfinite(sum(event.score_discarded))
    torch.testing.assert_close(model(input_ids=data[1]["input_ids"]).logits, logits, rtol=0, atol=1e-6)


def test_losses_of_a_model_without_a_head_are_refused(data):
    with pytest.raises(ValueError, match="batches"):
        analyze(build_lru().model, data, CompreSSMConfig(tolerance=0.1))


def test_a_model_without_a_head_and_one_in_half_precision_are_reduced_too(blocks):
    base = build_lru().model.eval()
    compress(base, analyze(base, None, CompreSSMConfig(target_state_size=6)))
    half = build_lru().bfloat16()
    compress(half, analyze(half, None, CompreSSMConfig(target_state_size=6)))
    for model, output in ((base, base(input_ids=blocks[:2])[0]), (half, half(input_ids=blocks[:2]).logits)):
        assert list(state_sizes(model).values()) == [6, 6] and torch.isfinite(output).all()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


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


def test_the_bound_on_the_movement_is_the_norm_of_the_change_of_the_hankel_operator(model):
    def operator(system):
        P, Q = (gramian.numpy() for gramian in gramians(torch.diag(system[0]), *system[1:]))
        root = scipy.linalg.sqrtm(P)
        return scipy.linalg.sqrtm(root @ Q @ root)

    model.model.layers[0].mixer.C.data[:, 10:] *= 100
    monitor, config = StateMonitor(), CompreSSMConfig(tolerance=0.1)
    monitor.observe(model, None, config, 1)
    before = systems_of(model)
    set_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    observation = monitor.observe(model, None, config, 2)
    for bound, then, now in zip(observation.weyl_bound, before, systems_of(model), strict=True):
        assert bound == pytest.approx(scipy.linalg.norm(operator(now) - operator(then), 2), rel=1e-4)
    assert monitor.observe(model, None, config, 3).movement == [0.0, 0.0]


def test_a_mamba_is_observed_on_data_without_being_disturbed(batches):
    model, config, monitor = build_model().train(), CompreSSMConfig(tolerance=0.1), StateMonitor()
    before, random = weights_of(model), random_state()
    first = monitor.observe(model, batches, config, 1)
    assert model.training and random_state() == random
    assert_identical(weights_of(model), before)
    expected = analyze(model, batches, config).hankel_singular_values
    for spectrum, reported in zip(first.hankel_singular_values, expected.values(), strict=True):
        assert torch.equal(spectrum, reported) and not spectrum.requires_grad
    second = monitor.observe(model, batches[2:] + batches[:2], config, 2)
    assert min(second.movement) > 0 and (first.movement, first.weyl_bound, second.weyl_bound) == (None, None, None)


def test_one_size_for_all_is_one_size_where_layers_differ():
    scores = {0: torch.linspace(10, 1, 10, dtype=torch.float64), 1: torch.linspace(20, 1, 20, dtype=torch.float64)}
    for goal in ({"cut_fraction": 0.6}, {"tolerance": 0.3}, {"loss_budget": 0.5}):
        chosen = choose_sizes(CompreSSMConfig(**goal), scores, "uniform", lambda sizes: 0.1 * (20 - sizes[1]))
        assert chosen[0] == min(10, chosen[1]) < 20


def test_a_target_is_judged_by_the_layers_that_may_be_cut(model):
    compress(model, analyze(model, None, CompreSSMConfig(target_state_size=4, skip_layers=[0])))
    with pytest.raises(ValueError, match=r"target_state_size = 8 is above the model.s 4 states"):
        analyze(model, None, CompreSSMConfig(target_state_size=8, skip_layers=[0]))


def test_states_that_are_grown_are_for_selective_models_only_but_any_model_can_be_padded(model, data):
    with pytest.raises(ValueError, match="grow_state knows selective models only, not 'lru'; use pad_state"):
        grow_state(model, 2 * N)
    before = model(**data[0]).logits
    pad_state(model, N + 3)
    assert set(state_sizes(model).values()) == {N + 3} and model.config.state_sizes == [N + 3] * 2
    torch.testing.assert_close(model(**data[0]).logits, before, rtol=0, atol=1e-6)


def test_the_recurrences_are_not_decayed(model):
    decayed, others = (set(group["params"]) for group in parameter_groups(model, 0.1))
    recurrences = {p for mixer in state_layers(model).values() for p in mixer.parameters()}
    assert recurrences <= others and model.classifier.weight in decayed


def test_labels_may_stand_in_a_column(model, data):
    columns = [batch | {"labels": batch["labels"].unsqueeze(1)} for batch in data]
    losses = [analyze(model, batches, CompreSSMConfig(tolerance=0.1)).loss_after for batches in (data, columns)]
    assert losses[0] == losses[1]


def test_a_mamba_that_does_not_learn_does_not_seem_to_move(tmp_path, dataset):
    callback = CompreSSMCallback(CompreSSMConfig(tolerance=1e-9), CompreSSMSchedule(events=1, monitor_steps=5))
    build_trainer(tmp_path, dataset, [callback], learning_rate=0.0).train()
    assert [seen.step for seen in callback.history.observations] == [5, 10, 15, 20]
    assert [seen.movement for seen in callback.history.observations[1:]] == [[0.0, 0.0]] * 3
