"""Balanced truncation of layers with scalar decay: what holds exactly, and what holds on average."""

import pytest
import torch
from torch.nn import functional as F

from hf_compressm.kernels.scalar_decay_scan import sampled_states
from hf_compressm.theory.scalar_decay import (
    GroupStatistics,
    balanced_projections,
    expected_squared_error,
    group_singular_values,
    layer_singular_values,
    layer_weyl_bound,
)

BATCH, LENGTH, HEADS, P, GROUPS, N = 3, 50, 4, 3, 2, 6


@pytest.fixture
def scan():
    """What a scan is given, float64: x, Δ, A, B, C."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, time_step = normal(BATCH, LENGTH, HEADS, P), F.softplus(normal(BATCH, LENGTH, HEADS))
    mixing = normal(2, GROUPS, N, N)  # states are correlated, so that some are nearly of no use
    B, C = (torch.einsum("blgn,gnm->blgm", normal(BATCH, LENGTH, GROUPS, N), of_all) for of_all in mixing)
    return x, time_step, -normal(HEADS).exp(), B * torch.logspace(0, -3, N).double(), C


def states_by_definition(x, time_step, A, B, C=None) -> torch.Tensor:
    """All states, (batch, L, G, heads / G · p, N), by the recurrence itself."""
    B = B.repeat_interleave(HEADS // GROUPS, 2)
    state, states = torch.zeros(BATCH, HEADS, P, B.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = (time_step[:, t] * A).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", time_step[:, t], x[:, t], B[:, t])
        states.append(state)
    return torch.stack(states, 1).unflatten(2, (GROUPS, -1)).flatten(3, 4)


def statistics_of(scan, positions=None, weight=None, mask=None) -> GroupStatistics:
    """Statistics over all positions, or over some."""
    statistics, states = GroupStatistics.empty(GROUPS, scan[3].shape[-1]), states_by_definition(*scan)
    weight = torch.ones(states.shape[:-1]) if weight is None else weight
    statistics.accumulate_maps(scan[3], scan[4], mask)
    for t in positions or range(LENGTH):
        statistics.accumulate_states(states[:, t], scan[4][:, t], weight[:, t], None if mask is None else mask[:, t])
    return statistics


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_sampled_states_are_those_of_the_recurrence(scan, chunk):
    whole, positions = states_by_definition(*scan), []
    for position, states in sampled_states(*scan[:4], chunk):
        torch.testing.assert_close(states, whole[:, position], rtol=1e-12, atol=1e-12)
        positions.append(position)
    assert positions == [*range(chunk - 1, LENGTH - 1, chunk), LENGTH - 1]


def test_sums_are_those_of_their_definition(scan):
    weight = torch.rand(BATCH, LENGTH, GROUPS, HEADS // GROUPS * P, dtype=torch.float64)
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [7], [20]])).long()
    statistics, h, C = statistics_of(scan, weight=weight, mask=mask), states_by_definition(*scan), scan[4]
    assert statistics.tokens == statistics.samples == mask.sum()
    weighted = weight * mask[:, :, None, None]
    P_sum = torch.einsum("blgk,blgkn,blgkm->gnm", weighted, h, h)
    torch.testing.assert_close(statistics.state_covariance, P_sum)
    torch.testing.assert_close(
        statistics.contribution_square,
        torch.einsum("blgk,blgkn,blgn->gn", weighted, h.square(), C.square()),
    )
    torch.testing.assert_close(statistics.output_covariance, torch.einsum("bl,blgn,blgm->gnm", mask.double(), C, C))


def test_statistics_of_parts_add_up(scan):
    merged = GroupStatistics.empty(GROUPS, N)
    for positions in (range(10), range(10, 40), range(40, LENGTH)):
        merged = merged.merge(statistics_of(scan, positions))
    for name, value in vars(statistics_of(scan)).items():
        times = 3 if name in ("tokens", "input_covariance", "output_covariance") else 1  # of all positions each time
        torch.testing.assert_close(getattr(merged, name), times * value, msg=name)


def test_the_projected_state_is_the_small_state_at_every_moment(scan):
    """Through two cuts, for any W and V, to 1e-12: nothing accumulates."""
    x, time_step, A, B, _ = scan
    first, second = (torch.randn(GROUPS, *shape, dtype=torch.float64) for shape in ((4, N), (2, 4)))
    once = torch.einsum("blgn,grn->blgr", B, first)
    twice = torch.einsum("blgn,grn->blgr", once, second)
    whole = states_by_definition(*scan)
    for small, W in ((once, first), (twice, second @ first)):
        expected = torch.einsum("blgkn,grn->blgkr", whole, W)
        given = states_by_definition(x, time_step, A, small)
        assert (given - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_singular_values_do_not_depend_on_the_basis(scan):
    x, time_step, A, B, C = scan
    basis = torch.randn(GROUPS, N, N, dtype=torch.float64)
    inverse = torch.linalg.inv(basis).mT
    other = (x, time_step, A, torch.einsum("blgn,gmn->blgm", B, basis), torch.einsum("blgn,gmn->blgm", C, inverse))
    sigma = group_singular_values(statistics_of(scan))
    torch.testing.assert_close(group_singular_values(statistics_of(other)), sigma, rtol=1e-6, atol=1e-9 * sigma.max())


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_expected_error_is_the_tail_of_the_singular_values_and_none_is_smaller(scan, size):
    statistics = statistics_of(scan)
    W, V = balanced_projections(statistics, size)
    tail = layer_singular_values(group_singular_values(statistics))[size:].square().sum()
    error = expected_squared_error(statistics, W, V)
    torch.testing.assert_close(error, tail, rtol=1e-6, atol=0)
    for _ in range(20):
        nudged = (each + 1e-3 * torch.randn_like(each) * each.abs().mean() for each in (W, V))
        assert expected_squared_error(statistics, *nudged) >= error * (1 - 1e-9)


def test_the_error_formula_holds_where_states_and_read_outs_are_independent(scan):
    """C of other positions, drawn at random, is uncorrelated with the states: then the average error is the tail."""
    h = states_by_definition(*scan).flatten(0, 1)  # (samples, G, K, N)
    C = torch.randn(40_000, GROUPS, N, dtype=torch.float64) @ torch.randn(N, N, dtype=torch.float64)
    h = h[torch.randint(len(h), (len(C),))]
    statistics = GroupStatistics.empty(GROUPS, N)
    statistics.accumulate_maps(C[:, None], C[:, None])
    statistics.accumulate_states(h, C, torch.ones(h.shape[:-1]))
    W, V = balanced_projections(statistics, 2)
    whole, small = torch.einsum("bgkn,bgn->bgk", h, C), torch.einsum("bgkn,grn,grm,bgm->bgk", h, W, V, C)
    measured = (whole - small).square().sum((1, 2)).mean()
    assert measured == pytest.approx(float(expected_squared_error(statistics, W, V)), rel=0.05)


def test_semi_definite_gramians_have_a_rank(scan):
    """Where two states are copies of each other, the whole layer has one fewer, and no projection is infinite."""
    x, time_step, A, B, C = scan
    B, C = B.clone(), C.clone()
    B[..., 1] = B[..., 0]
    C[..., 3] = 0
    statistics = statistics_of((x, time_step, A, B, C))
    W, V = balanced_projections(statistics, N)
    assert torch.isfinite(W).all() and torch.isfinite(V).all()
    assert (W[:, -2:] == 0).all()
    assert expected_squared_error(statistics, W, V) < 1e-10 * group_singular_values(statistics).square().sum()


def test_no_singular_value_moves_further_than_weyls_bound(scan):
    before = statistics_of(scan)
    now = statistics_of((*scan[:3], scan[3] + 0.1 * torch.randn_like(scan[3]), scan[4]))
    moved = (
        layer_singular_values(group_singular_values(now)) - layer_singular_values(group_singular_values(before))
    ).abs()
    assert 0 < moved.max() <= layer_weyl_bound(*before.gramians, *now.gramians)
