"""Criteria of layers with groups of heads: what each measures, and that sets of states are chosen as sets."""

import pytest
import torch

from hf_compressm.theory.criteria import choose_states, score_power, scores_by_rank, squared_errors, state_scores
from hf_compressm.theory.group_criteria import GROUP_CRITERIA, GroupStates, choose_columns, pursuit_gains
from hf_compressm.theory.scalar_decay import GroupStatistics

GROUPS, N, CHANNELS, TOKENS = 2, 6, 5, 400


def states_of(B, C, h, weight=None) -> GroupStates:
    statistics = GroupStatistics.empty(GROUPS, N)
    statistics.accumulate_maps(B[:, None], C[:, None])
    statistics.accumulate_states(h, C, torch.ones(h.shape[:-1]) if weight is None else weight)
    magnitudes = torch.arange(1.0, 13).view(2, N), torch.ones(2, N)
    return GroupStates(statistics, magnitudes, lambda: -torch.arange(12.0).view(2, N), torch.Generator())


@pytest.fixture
def samples():
    torch.manual_seed(0)
    B, C = torch.randn(2, TOKENS, GROUPS, N, dtype=torch.float64)
    return B, C, torch.randn(TOKENS, GROUPS, CHANNELS, N, dtype=torch.float64)


@pytest.mark.parametrize("name", GROUP_CRITERIA)
def test_a_criterion_gives_a_score_for_each_state(samples, name):
    scores = state_scores(name, states_of(*samples))
    assert scores.shape == (GROUPS, N) and scores.dtype == torch.float64 and (scores >= 0).all()
    assert score_power(name) in (1, 2)


def test_output_is_the_error_without_the_state(samples):
    B, C, h = samples
    weight = torch.rand(h.shape[:-1], dtype=torch.float64)
    error = (weight.unsqueeze(-1) * (h * C.unsqueeze(2)).square()).sum(2).mean(0)
    torch.testing.assert_close(state_scores("output", states_of(B, C, h, weight)), error.sqrt())


def test_ghost_is_the_product_of_means(samples):
    _, C, h = samples
    expected = h.square().sum(2).mean(0) * C.square().mean(0)
    torch.testing.assert_close(state_scores("ghost", states_of(*samples)).square(), expected)


@pytest.mark.parametrize("choose", ["rrqr", "greedy"])
def test_of_two_states_that_are_copies_one_is_kept(samples, choose):
    """Scores of single states would keep both, since both are strong."""
    B, C, h = samples
    for tensor in (B, C, h):
        tensor[..., 4] = tensor[..., 1] = 3 * tensor[..., 1]
    layer = states_of(B, C, h)
    both = choose_states(state_scores("output", layer), 2, "largest", torch.Generator())
    assert both.tolist() == [[1, 4]] * GROUPS
    kept = choose_columns(layer.statistics, 3) if choose == "rrqr" else None
    if kept is None:
        kept = choose_states(state_scores(choose, layer), 3, "largest", torch.Generator())
    assert all(len({1, 4} & set(of_group)) == 1 for of_group in kept.tolist())


def test_the_gains_of_the_pursuit_are_what_each_choice_takes_away_from_the_error(samples):
    """What is left of the error after some choices is tr Q (P - P_:K P_KK⁻¹ P_K:), by least squares on them."""
    layer = states_of(*samples)
    gains = state_scores("greedy", layer)
    for P, Q, of_group in zip(*layer.statistics.gramians, gains, strict=True):
        order = of_group.argsort(descending=True)
        for count in range(N + 1):
            kept = order[:count]
            rest = P - P[:, kept] @ torch.linalg.solve(P[kept][:, kept], P[kept])
            torch.testing.assert_close(of_group[order[count:]].sum(), (Q @ rest).trace(), rtol=1e-9, atol=1e-12)


def test_states_that_are_worth_much_only_together_do_not_come_before_what_was_chosen_earlier():
    """In y = 10 (h₁ - h₂) + h₃ the first two, nearly equal, alone say nothing of y: the pursuit begins with h₃."""
    P = torch.tensor([[100.01, 99.99, 0], [99.99, 100.01, 0], [0, 0, 1]], dtype=torch.float64)
    C = torch.tensor([10.0, -10, 1], dtype=torch.float64)
    gains = pursuit_gains(P, torch.outer(C, C))
    assert gains.argmax() == 2
    torch.testing.assert_close(gains.sum(), C @ P @ C, rtol=1e-6, atol=0)


def test_swaps_find_columns_that_pivots_miss():
    """On Kahan's matrix pivots keep the first columns, which have the smaller volume."""
    n, c = 30, 0.285
    s = (1 - c**2) ** 0.5
    kahan = torch.diag(s ** torch.arange(n).double()) @ (torch.eye(n) - c * torch.ones(n, n).triu(1)).double()
    statistics = GroupStatistics.empty(1, n)
    statistics.accumulate_maps(kahan[None, :, None], torch.zeros(1, n, 1, n))
    scores = state_scores("rrqr", GroupStates(statistics, (), None, None))
    pivots = choose_states(scores, n - 1, "largest", torch.Generator())[0]
    kept = choose_columns(statistics, n - 1)[0]
    volume_of_pivots, volume = (torch.linalg.svdvals(kahan[:, columns]).log().sum() for columns in (pivots, kept))
    assert volume > volume_of_pivots + 0.5


def test_groups_are_ranked_together():
    scores = torch.tensor([[1.0, 5.0, 2.0], [10.0, 20.0, 30.0]], dtype=torch.float64)
    assert scores_by_rank(scores).tolist() == [35.0, 22.0, 11.0]
    assert scores_by_rank(scores[0]).tolist() == [5.0, 2.0, 1.0]
    assert squared_errors(scores, 2).tolist() == [68.0, 33.0, 11.0, 0.0]
    assert choose_states(scores, 2, "largest", torch.Generator()).tolist() == [[1, 2], [1, 2]]
    assert choose_states(scores, 1, "smallest", torch.Generator()).tolist() == [[0], [0]]


def test_a_criterion_of_ones_own_scores_groups(samples):
    layer = states_of(*samples)
    assert torch.equal(state_scores(lambda layer: layer.magnitudes[0], layer), layer.magnitudes[0].double())
    with pytest.raises(ValueError, match="allowed: a tensor of 2 · 6 scores"):
        state_scores(lambda layer: torch.ones(6), layer)
