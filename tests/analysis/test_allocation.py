"""How many states each layer keeps: what a tolerance, a target, a fraction or a loss budget asks for."""

import pytest
import torch
from conftest import build_lru

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.analysis.allocation import choose_sizes
from hf_compressm.architectures import state_sizes

N = 16


def tail_share(sigma: torch.Tensor, rank: int) -> float:
    return float(sigma[rank:].sum() / sigma.sum())


def test_each_layer_gets_the_smallest_rank_within_the_tolerance_or_all_the_largest(lru):
    config = CompreSSMConfig(tolerance=0.05)
    report = analyze(lru, None, config)
    sizes = report.state_sizes
    assert sizes[0] != sizes[1]
    for index, size in sizes.items():
        sigma = report.scores[index]
        assert tail_share(sigma, size) <= 0.05 < tail_share(sigma, size - 1)
        assert report.score_discarded[index] == pytest.approx(tail_share(sigma, size))
        assert report.kept_states[index].tolist() == list(range(size))
    assert analyze(lru, None, CompreSSMConfig(tolerance=0.05, allocation="per_layer")).state_sizes == sizes
    uniform = analyze(lru, None, CompreSSMConfig(tolerance=0.05, allocation="uniform")).state_sizes
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
def test_a_loss_budget_is_kept_and_the_next_smaller_candidate_breaks_it(lru, lru_batches, allocation):
    options = {"allocation": allocation, "min_reduction": 0.0}
    budget = 0.005
    report = analyze(lru, lru_batches, CompreSSMConfig(loss_budget=budget, **options))
    allowed = report.loss_before + budget
    assert report.is_cut and report.loss_after <= allowed
    if allocation == "uniform":
        assert report.state_sizes[0] == report.state_sizes[1]
        smaller = CompreSSMConfig(target_state_size=report.state_sizes[0] - 1, **options)
    else:  # the next tolerance at which a layer loses a state
        shares = [tail_share(report.scores[i], size - 1) for i, size in report.state_sizes.items() if size > 1]
        smaller = CompreSSMConfig(tolerance=min(shares) + 1e-12, **options)
    assert sum(analyze(lru, None, smaller).state_sizes.values()) < sum(report.state_sizes.values())
    assert analyze(lru, lru_batches, smaller).loss_after > allowed


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


def test_one_size_for_all_is_one_size_where_layers_differ():
    scores = {0: torch.linspace(10, 1, 10, dtype=torch.float64), 1: torch.linspace(20, 1, 20, dtype=torch.float64)}
    for goal in ({"cut_fraction": 0.6}, {"tolerance": 0.3}, {"loss_budget": 0.5}):
        chosen = choose_sizes(CompreSSMConfig(**goal), scores, "uniform", lambda sizes: 0.1 * (20 - sizes[1]))
        assert chosen[0] == min(10, chosen[1]) < 20


def test_a_target_is_judged_by_the_layers_that_may_be_cut(lru):
    compress(lru, analyze(lru, None, CompreSSMConfig(target_state_size=4, skip_layers=[0])))
    with pytest.raises(ValueError, match=r"target_state_size = 8 is above the model.s 4 states"):
        analyze(lru, None, CompreSSMConfig(target_state_size=8, skip_layers=[0]))
