"""One goal for all layers together: those keep more whose states the loss needs more, and noise strips none bare."""

from itertools import product

import pytest
import torch
from conftest import build_model, build_trainer, weights_of

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    CompreSSMSchedule,
    LRUConfig,
    LRUForSequenceClassification,
    analyze,
    compress,
)
from hf_compressm.analysis.allocation import choose_sizes, predicted_changes
from hf_compressm.architectures import state_sizes
from hf_compressm.architectures.selective.per_layer import CompreSSMMambaForCausalLM

N = 12
ENERGIES = {
    index: torch.rand(N, generator=torch.Generator().manual_seed(index), dtype=torch.float64) ** (index + 1)
    for index in range(3)
}
ERRORS = {
    index: torch.cat([torch.zeros(1), score.sort().values.square().cumsum(0)]).flip(0)
    for index, score in ENERGIES.items()
}


def loss_with(sensitivities):
    """sizes → the loss of a model that answers to the error of each layer by so much."""
    return lambda sizes: 2.0 + sum(s * float(ERRORS[i][sizes.get(i, N)]) for i, s in enumerate(sensitivities))


def chosen(sensitivities=(1.0, 1.0, 1.0), errors=ERRORS, loss_of=None, **options):
    config = CompreSSMConfig(allocation="global", **options)
    return list(choose_sizes(config, ENERGIES, "global", loss_of or loss_with(sensitivities), errors).values())


@pytest.mark.parametrize("sensitivities", [(1.0, 1.0, 1.0), (0.1, 1.0, 5.0), (5.0, 0.0, 0.3)])
@pytest.mark.parametrize("target", [1, 2, 5, 9, 12])
def test_of_all_sizes_with_this_mean_those_are_chosen_that_are_predicted_to_cost_least(sensitivities, target):
    config = CompreSSMConfig(target_state_size=target, allocation="global")
    changes = predicted_changes(config, ERRORS, loss_with(sensitivities))

    def cost(sizes):
        return sum(float(changes[index][size]) for index, size in enumerate(sizes))

    sizes = chosen(sensitivities, target_state_size=target)
    assert sum(sizes) == 3 * target
    possible = [sizes for sizes in product(range(1, N + 1), repeat=3) if sum(sizes) == 3 * target]
    assert cost(sizes) == pytest.approx(min(map(cost, possible)), rel=1e-9, abs=1e-15)


def test_an_expensive_state_on_the_way_to_cheap_ones_does_not_bar_it():
    """Errors that compensation made uneven: layer 1 loses much with one state, and with the next four nothing."""
    uneven = ERRORS | {1: torch.tensor([9.0, 8.0, 1.1, 1.1, 1.1, 1.1, 1.1, 0.0, 0, 0, 0, 0, 0], dtype=torch.float64)}
    even = {0: torch.linspace(N, 0, N + 1, dtype=torch.float64), 2: torch.linspace(N, 0, N + 1, dtype=torch.float64)}
    sizes = chosen(errors=uneven | even, loss_of=lambda sizes: 2.0, target_state_size=10)
    assert sizes == [12, 6, 12]


def test_a_layer_that_the_loss_needs_more_keeps_more():
    same = {index: ERRORS[0] for index in ERRORS}

    def loss_of(sizes):
        return sum(s * float(same[i][sizes.get(i, N)]) for i, s in enumerate((1.0, 10.0, 1.0)))

    sizes = chosen(errors=same, loss_of=loss_of, target_state_size=4)
    assert sizes[1] > sizes[0] == sizes[2] and sum(sizes) == 12


@pytest.mark.parametrize("noise", [-0.5, 0.0])
def test_a_layer_whose_cut_seemed_to_cost_nothing_is_not_stripped_for_it(noise):
    """Two losses of few sequences differ by chance as well."""
    same = {index: ERRORS[0] for index in ERRORS}
    sizes = chosen(errors=same, loss_of=lambda sizes: noise * (sizes.get(0, N) < N), target_state_size=4)
    assert sizes == [4, 4, 4]
    heard = chosen(errors=same, loss_of=lambda sizes: 1.0 * (sizes.get(1, N) < N), target_state_size=4)
    assert 1 < heard[0] < heard[1]


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"target_state_size": 6, "multiple_of": 3}, 18),
        ({"target_state_size": 5, "min_state_size": 4}, 15),
        ({"cut_fraction": 0.25}, 27),
        ({"cut_fraction": 0.01}, 36),  # of 36 states less than one
        ({"cut_fraction": 0.5, "multiple_of": 4}, 20),
        ({"cut_fraction": 0.99, "min_state_size": 2}, 6),
        ({"target_state_size": 4, "skip_layers": [1]}, 20),
    ],
)
def test_the_goal_holds_for_all_layers_together(options, total):
    sizes = chosen((0.1, 1.0, 5.0), **options)
    assert sum(sizes) == total
    multiple_of, smallest = options.get("multiple_of", 1), options.get("min_state_size", 1)
    assert all((size % multiple_of == 0 or size == N) and size >= smallest for size in sizes)
    assert sizes[1] == N or "skip_layers" not in options


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.5])
def test_a_tolerance_is_a_share_of_what_all_states_are_predicted_to_cost(tolerance):
    config = CompreSSMConfig(tolerance=tolerance, allocation="global", min_reduction=0)
    changes = predicted_changes(config, ERRORS, loss_with((1.0, 1.0, 1.0)))
    total = sum(float(change[0]) for change in changes.values())
    sizes = chosen(tolerance=tolerance, min_reduction=0)
    cost = sum(float(changes[index][size]) for index, size in enumerate(sizes))
    next_cheapest = min(float(changes[i][size - 1] - changes[i][size]) for i, size in enumerate(sizes) if size > 1)
    assert cost <= tolerance * total < cost + next_cheapest
    gated = chosen(tolerance=tolerance, min_reduction=0.5)
    assert gated == [size if size < N / 2 else N for size in sizes]


@pytest.mark.parametrize("budget", [0.01, 0.1, 1.0])
def test_the_measured_loss_decides_on_a_budget(budget):
    """And not what was predicted: the layers interact."""

    def loss_of(sizes):
        errors = [float(ERRORS[i][sizes.get(i, N)]) for i in range(3)]
        return sum(errors) + errors[0] * errors[1] * 10

    sizes = chosen(loss_of=loss_of, loss_budget=budget, min_reduction=0)
    assert loss_of(dict(enumerate(sizes))) <= budget
    one_fewer = chosen(loss_of=loss_of, cut_fraction=(36 - sum(sizes) + 1) / 36)
    assert sum(one_fewer) == sum(sizes) - 1 and loss_of(dict(enumerate(one_fewer))) > budget


def test_a_model_gets_sizes_of_its_own_and_is_measured_so(learned, batches):
    model = build_model(num_hidden_layers=2)
    model.load_state_dict(learned)
    config = CompreSSMConfig(target_state_size=4, allocation="global", calibration_batches=8)
    report = analyze(model, batches, config)
    assert sum(report.state_sizes.values()) == 8 and len(set(report.state_sizes.values())) == 2
    compress(model, report)
    assert type(model) is CompreSSMMambaForCausalLM and state_sizes(model) == report.state_sizes
    with torch.no_grad():
        loss = sum(model.eval()(**batch).loss.item() for batch in batches[1:8:2]) / 4
    assert loss == pytest.approx(report.loss_after, abs=1e-6)


def test_over_several_cuts_a_target_is_approached_by_the_mean(tmp_path, dataset):
    config = CompreSSMConfig(target_state_size=4, allocation="global")
    callback = CompreSSMCallback(config, CompreSSMSchedule(end=0.5, events=2))
    trainer = build_trainer(tmp_path, dataset, [callback], max_steps=12, save_strategy="steps", save_steps=4)
    trainer.train()
    assert [sum(event.state_sizes_after) for event in callback.history.events] == [16, 8]
    resumed = build_trainer(tmp_path, dataset, [CompreSSMCallback(config, callback.schedule)], max_steps=12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    left, right = weights_of(resumed.model), weights_of(trainer.model)
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_what_it_cannot_serve_is_refused(batches):
    with pytest.raises(ValueError, match="selection = 'random'; allowed: 'largest': a global allocation compares"):
        CompreSSMConfig(tolerance=0.1, allocation="global", selection="random")
    model = LRUForSequenceClassification(LRUConfig(state_size=8, hidden_size=8, num_hidden_layers=2, num_labels=2))
    with pytest.raises(ValueError, match="allocation = 'global'; the layers of model type 'lru' are reduced from"):
        analyze(model, None, CompreSSMConfig(tolerance=0.1, allocation="global"))
    config = CompreSSMConfig(target_state_size=12, allocation="global")
    model = build_model()
    compress(
        model, analyze(model, batches, CompreSSMConfig(cut_fraction=0.5, allocation="per_layer", skip_layers=[0]))
    )
    with pytest.raises(ValueError, match="target_state_size = 13 is above the model's 12 states"):
        analyze(model, batches, CompreSSMConfig(target_state_size=13, allocation="global"))
    assert not analyze(model, batches, config).is_cut
