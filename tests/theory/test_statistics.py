"""What the states of a layer do and how they are scored: all against dense references."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from hf_compressm.theory.criteria import CRITERIA, LayerStates
from hf_compressm.theory.selective import (
    RIDGE,
    SAMPLED_CHANNELS,
    Statistics,
    compensation,
    complement,
    gramian_diagonals,
    layer_hankel_singular_values,
    sampled_channels,
    sampled_gramians,
    unexplained_shares,
)

FIELDS = [field.name for field in fields(Statistics)]
OVER_TIME = ("u", "time_step", "B", "C", "gate")
SURROGATES = ["mean", "second_moment"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_scan(batch=3, channels=5, state_size=7, length=19, seed=0):
    """What a layer hands to its scan, and w; nothing zero-mean, float64."""
    seeds = iter(range(100 * seed, 100 * seed + 7))
    return {
        "u": 0.5 + normal(batch, channels, length, seed=next(seeds)),
        "time_step": F.softplus(normal(batch, channels, length, seed=next(seeds)) - 1),
        "A": -torch.exp(normal(channels, state_size, seed=next(seeds))),
        "B": 0.3 + normal(batch, state_size, length, seed=next(seeds)),
        "C": 0.3 + normal(batch, state_size, length, seed=next(seeds)),
        "gate": normal(batch, channels, length, seed=next(seeds)),
        "channel_weight": normal(channels, seed=next(seeds)).exp(),
    }


def measure(scan, mask=None):
    return accumulate(Statistics.empty(*scan["A"].shape), scan, mask)


def accumulate(statistics, scan, mask=None):
    statistics.accumulate(**scan, states=dense_states(**scan).mT, mask=mask)
    return statistics


def dense_states(u, time_step, A, B, **_):
    """Every state, (batch, L, D, N), by the recurrence."""
    h, states = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        step = time_step[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[:, None, :, t]
        states.append(h)
    return torch.stack(states, 1)


def dense_factors(scan):
    """exp(Δ A), Δ, Δ u, B, C, g, w as (batch, L, D or 1, N or 1)."""
    step = scan["time_step"].mT[..., None]
    gate = scan["gate"]
    g = torch.ones_like(step) if gate is None else (gate * torch.sigmoid(gate)).mT[..., None]
    B, C = scan["B"].mT[:, :, None], scan["C"].mT[:, :, None]
    return torch.exp(step * scan["A"]), step, step * scan["u"].mT[..., None], B, C, g, scan["channel_weight"][:, None]


def outer(v):
    return v.unsqueeze(-1) * v.unsqueeze(-2)


def dense_statistics(scan):
    decay, step, drive, B, C, g, w = dense_factors(scan)
    h, sample = dense_states(**scan), sampled_channels(scan["A"].shape[0])
    x, weight = 1 - decay, w * g.square()
    return Statistics(
        tokens=torch.tensor(h.shape[0] * h.shape[1], dtype=torch.float64),
        output_energy=(weight * (C * h).square()).sum((0, 1, 2)),
        product_energy=(C * h).square().sum((0, 1, 2)),
        gated_covariance=(weight[..., None] * outer(h)).sum((0, 1, 2)),
        decay=x.sum((0, 1)),
        decay_square=x.square().sum((0, 1)),
        input_map=(step * B).sum((0, 1)),
        input_square=(drive * B).square().sum((0, 1)),
        output_map=C.sum((0, 1, 2)),
        output_square=(weight * C.square()).sum((0, 1)),
        sampled_decay=outer(x).sum((0, 1))[sample],
        sampled_input=outer(drive * B).sum((0, 1))[sample],
        sampled_output=(weight[..., None] * outer(C)).sum((0, 1))[sample],
    )


def assert_same(statistics, expected, rtol=1e-12):
    for name in FIELDS:
        actual, value = getattr(statistics, name), getattr(expected, name)
        assert actual.shape == value.shape, name
        assert (actual - value).abs().max() <= rtol * value.abs().max(), name


# Sums


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7, 19), (1, 1, 1, 1), (2, 3, 1, 8), (1, 37, 3, 25)])
def test_every_sum_equals_the_dense_one(shape, gated):
    scan = random_scan(*shape)
    scan["gate"] = scan["gate"] if gated else None
    assert_same(measure(scan), dense_statistics(scan))


def test_sampled_channels_are_distinct_sorted_and_reach_both_ends():
    for channels in (1, 2, 31, 32, 33, 37, 1536):
        sample = sampled_channels(channels)
        assert len(sample) == min(channels, SAMPLED_CHANNELS)
        assert (sample.diff() > 0).all() and sample[0] == 0 and sample[-1] == channels - 1


def test_merging_two_halves_of_a_batch_equals_the_whole_and_so_does_accumulating_them():
    scan = random_scan(batch=5)
    halves = [scan | {name: scan[name][part] for name in OVER_TIME} for part in (slice(2), slice(2, 5))]
    whole = measure(scan)
    first, second = map(measure, halves)
    assert_same(first.merge(second), whole)
    accumulate(first, halves[1])
    assert_same(first, whole)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_contributes_nothing(side):
    """As Mamba makes it: u, B and C are zero at padding, Δ (its bias) and the gate are not."""
    scan, lengths = random_scan(), (19, 11, 1)
    positions = torch.arange(19) if side == "right" else torch.arange(19).flip(0)
    mask = (positions < torch.tensor(lengths)[:, None]).long()
    padded = scan | {name: scan[name] * mask[:, None] for name in ("u", "B", "C")}
    expected = Statistics.empty(5, 7)
    for i, tokens in enumerate(mask.bool()):
        accumulate(expected, scan | {name: scan[name][i : i + 1, :, tokens] for name in OVER_TIME})
    assert expected.tokens == sum(lengths)
    assert_same(measure(padded, mask), expected)


def test_sums_are_float64_whatever_the_inputs():
    scan = random_scan()
    single = {name: tensor.float() for name, tensor in scan.items()} | {"gate": scan["gate"].bfloat16()}
    statistics = measure(single)
    assert all(getattr(statistics, name).dtype == torch.float64 for name in FIELDS)
    assert_same(statistics, measure(scan | {"gate": single["gate"].double()}), rtol=1e-5)


def test_sums_do_not_depend_on_autocast():
    single = {name: tensor.float() for name, tensor in random_scan().items()}
    expected = measure(single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = measure(single)
    assert_same(in_autocast, expected, rtol=1e-6)


# Criteria


def layer_states(scan, seed=0):
    state_size, channels = scan["A"].shape[1], scan["A"].shape[0]
    return LayerStates(
        statistics=measure(scan),
        B_rows=normal(state_size, channels, seed=1, dtype=torch.float32),
        C_rows=normal(state_size, channels, seed=2, dtype=torch.float32),
        gradients=lambda: (normal(state_size, channels, seed=3), normal(state_size, channels, seed=4)),
        generator=torch.Generator().manual_seed(seed),
    )


def gated_output(scan):
    """silu(z) y, (batch, L, D)."""
    *_, C, g, _ = dense_factors(scan)
    return (g * (C * dense_states(**scan)).sum(-1, keepdim=True)).squeeze(-1)


def test_output_energy_is_the_error_of_the_gated_output_when_a_state_is_removed():
    scan = random_scan()
    scores, y = CRITERIA["output"](layer_states(scan)), gated_output(scan)
    for n in range(7):
        without = scan["C"].clone()
        without[:, n] = 0
        error = gated_output(scan | {"C": without}) - y
        expected = (scan["channel_weight"] * error.square()).sum(-1).mean()
        assert scores[n].square().item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_gains_of_the_pursuit_are_what_each_choice_takes_away_from_what_the_kept_do_not_predict():
    layer = layer_states(random_scan())
    gains, single = CRITERIA["greedy"](layer), CRITERIA["output"](layer).square()
    covariance, metric = layer.statistics.gated_covariance, layer.statistics.sampled_output.sum(0)
    metric = metric * single.sum() / (covariance.diagonal() * metric.diagonal()).sum()
    order = gains.argsort(descending=True)
    for count in range(1, 7):
        kept, dropped = order[:count], order[count:]
        explained = torch.linalg.solve(covariance[kept][:, kept], covariance[kept][:, dropped])
        rest = covariance[dropped][:, dropped] - covariance[dropped][:, kept] @ explained
        error = (metric[dropped][:, dropped] * rest).sum()
        torch.testing.assert_close(gains[dropped].sum(), error, rtol=1e-9, atol=1e-12)


def test_of_two_states_that_are_copies_the_pursuit_keeps_one():
    """By the errors of single states both would be kept, since both are strong."""
    scan = random_scan()
    for name in ("B", "C"):
        scan[name][:, 4] = scan[name][:, 1] = 3 * scan[name][:, 1]
    scan["A"][:, 4] = scan["A"][:, 1] = -0.05
    layer = layer_states(scan)
    assert set(CRITERIA["output"](layer).topk(2).indices.tolist()) == {1, 4}
    assert len({1, 4} & set(CRITERIA["greedy"](layer).topk(6).indices.tolist())) == 1


def test_ghost_is_what_removing_a_state_changes_before_the_gate_and_the_output_projection():
    scan = random_scan()
    bare = scan | {"gate": None, "channel_weight": torch.ones(5, dtype=torch.float64)}
    score = CRITERIA["ghost"](layer_states(scan))
    torch.testing.assert_close(score, CRITERIA["output"](layer_states(bare)), rtol=1e-12, atol=0)


def test_aire_and_last_are_energy_and_squared_peak_gain_of_the_frozen_systems_response():
    scan = random_scan()
    decay, step, _, B, C, *_ = dense_factors(scan)
    eigenvalues, b, c = decay.mean((0, 1)), (step * B).mean((0, 1)), C.mean((0, 1, 2))
    response = c * b * eigenvalues ** torch.arange(3000)[:, None, None]  # (k, D, N)
    torch.testing.assert_close(CRITERIA["aire"](layer_states(scan)), response.square().sum((0, 1)), rtol=1e-9, atol=0)
    frequencies = torch.exp(1j * torch.linspace(0, torch.pi, 101, dtype=torch.float64))[:, None, None]
    peak = (c * b / (frequencies - eigenvalues)).abs().amax(0)
    torch.testing.assert_close(CRITERIA["last"](layer_states(scan)), peak.square().sum(0), rtol=1e-9, atol=0)


def test_decays_too_slow_for_their_eigenvalue_to_be_told_from_one_are_scored_exactly():
    scan = random_scan() | {"A": torch.full((5, 7), -1e-18, dtype=torch.float64)}
    _, step, _, B, C, *_ = dense_factors(scan)
    x, gain = 1e-18 * step.mean((0, 1)), (C.mean((0, 1, 2)) * (step * B).mean((0, 1))).square()
    torch.testing.assert_close(CRITERIA["aire"](layer_states(scan)), (gain / (2 * x)).sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(CRITERIA["last"](layer_states(scan)), (gain / x**2).sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gramian_scores_sum_the_channels_of_their_surrogate(surrogate):
    scan = random_scan()
    P, Q = sampled_gramians(measure(scan), surrogate)  # all five channels are in the sample
    expected = (P.diagonal(dim1=1, dim2=2) * Q.diagonal(dim1=1, dim2=2)).sqrt().sum(0)
    torch.testing.assert_close(CRITERIA[surrogate](layer_states(scan)), expected, rtol=1e-12, atol=0)


def test_magnitude_is_the_product_of_the_norms_of_the_rows():
    layer = layer_states(random_scan())
    expected = (layer.B_rows.double().square().sum(1) * layer.C_rows.double().square().sum(1)).sqrt()
    torch.testing.assert_close(CRITERIA["magnitude"](layer), expected, rtol=1e-12, atol=0)


def test_random_scores_repeat_with_their_generator():
    scan = random_scan()
    scores = CRITERIA["random"](layer_states(scan, seed=3))
    assert torch.equal(scores, CRITERIA["random"](layer_states(scan, seed=3)))
    assert not torch.equal(scores, CRITERIA["random"](layer_states(scan, seed=4)))
    assert (scores >= 0).all() and (scores < 1).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_gives_a_float64_score_per_state(name):
    single = {key: tensor.float() for key, tensor in random_scan().items()}
    scores = CRITERIA[name](layer_states(single))
    assert scores.shape == (7,) and scores.dtype == torch.float64 and (scores >= 0).all()


# Surrogate Gramians


@pytest.mark.parametrize("channels", [5, 37])
def test_mean_gramians_solve_the_lyapunov_equations_of_the_frozen_system(channels):
    scan = random_scan(channels=channels)
    decay, step, _, B, C, _, _ = dense_factors(scan)
    a, b, c = decay.mean((0, 1)), (step * B).mean((0, 1)), C.mean((0, 1, 2))
    Ps, Qs = sampled_gramians(measure(scan), "mean")
    for d, P, Q in zip(sampled_channels(channels).tolist(), Ps, Qs, strict=True):
        A_bar = torch.diag(a[d])
        torch.testing.assert_close(A_bar @ P @ A_bar.T + torch.outer(b[d], b[d]), P, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(A_bar.T @ Q @ A_bar + torch.outer(c, c), Q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [5, 37])
def test_second_moment_gramians_solve_the_mean_square_lyapunov_equations(channels):
    scan = random_scan(channels=channels)
    decay, _, drive, B, C, g, w = dense_factors(scan)
    Ps, Qs = sampled_gramians(measure(scan), "second_moment")
    for d, P, Q in zip(sampled_channels(channels).tolist(), Ps, Qs, strict=True):
        A_bar = torch.diag_embed(decay[:, :, d])
        noise = outer(drive[:, :, d] * B[:, :, 0]).mean((0, 1))
        output = outer(w[d].sqrt() * g[:, :, d] * C[:, :, 0]).mean((0, 1))
        torch.testing.assert_close((A_bar @ P @ A_bar).mean((0, 1)) + noise, P, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close((A_bar @ Q @ A_bar).mean((0, 1)) + output, Q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gramian_diagonals_are_those_of_the_sampled_gramians(surrogate):
    statistics = measure(random_scan(channels=37))
    for diagonals, full in zip(
        gramian_diagonals(statistics, surrogate), sampled_gramians(statistics, surrogate), strict=True
    ):
        assert diagonals.shape == (37, 7) and full.shape == (SAMPLED_CHANNELS, 7, 7)
        expected = full.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(diagonals[sampled_channels(37)], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_slow_decays_keep_their_relative_accuracy_in_float32(surrogate):
    """P = numerator / (1 - ā²) with ā = exp(-1e-7), which float32 rounds to 1."""
    scan = {name: tensor.float() for name, tensor in random_scan().items()}
    scan["time_step"], scan["A"] = torch.full_like(scan["u"], 1e-3), torch.full_like(scan["A"], -1e-4)
    statistics = measure(scan)
    P, Q = gramian_diagonals(statistics, surrogate)
    input_square, output_square = statistics.input_square / 57, statistics.output_square / 57
    if surrogate == "mean":
        input_square = (statistics.input_map / 57).square()
        output_square = (statistics.output_map / 57).square().expand_as(Q)
    loss = -torch.expm1(torch.tensor(-2e-7, dtype=torch.float64))
    torch.testing.assert_close(input_square / P, loss.expand_as(P), rtol=1e-4, atol=0)
    torch.testing.assert_close(output_square / Q, loss.expand_as(Q), rtol=1e-4, atol=0)


def test_gramians_of_dependent_states_stay_semi_definite_in_float32():
    scan = random_scan(batch=2, channels=32, state_size=16, length=64)
    for name in "BC":  # sixteen states, two directions
        scan[name] = torch.einsum("nm,bml->bnl", normal(16, 2), scan[name][:, :2])
    statistics = measure({name: tensor.float() for name, tensor in scan.items()})
    for gramian in sampled_gramians(statistics, "second_moment"):
        eigenvalues = torch.linalg.eigvalsh(gramian)
        assert (eigenvalues > -1e-12 * eigenvalues.amax(-1, keepdim=True)).all()
    assert torch.isfinite(layer_hankel_singular_values(statistics, "second_moment")).all()


def test_the_layer_spectrum_is_the_mean_over_sampled_channels():
    statistics = measure(random_scan(state_size=3))
    P, Q = sampled_gramians(statistics, "second_moment")
    expected = torch.linalg.eigvals(P @ Q).real.sqrt().sort(descending=True).values.mean(0)
    torch.testing.assert_close(layer_hankel_singular_values(statistics, "second_moment"), expected, rtol=1e-8, atol=0)


# Compensation


KEEP = torch.tensor([0, 2, 4, 5])
DROPPED = torch.tensor([1, 3, 6])


def test_complement_is_what_is_not_kept():
    assert complement(KEEP, 7).tolist() == DROPPED.tolist()
    assert complement(torch.arange(7), 7).tolist() == []


def gated_states(scan):
    """Rows sqrt(w_d) g_d h_dn, one per token and channel: (batch L D, N)."""
    *_, g, w = dense_factors(scan)
    return (w.sqrt() * g * dense_states(**scan)).flatten(0, 2)


def test_compensation_is_the_least_squares_map_from_kept_to_dropped_states():
    scan = random_scan(batch=5, length=37)
    rows = gated_states(scan)
    G = compensation(measure(scan).gated_covariance, KEEP)
    assert G.shape == (3, 4) and G.dtype == torch.float64
    least_squares = torch.linalg.lstsq(rows[:, KEEP], rows[:, DROPPED]).solution.mT
    assert (G - least_squares).norm() < 1e-3 * least_squares.norm()

    ridge = RIDGE * rows[:, KEEP].square().sum(0).mean()  # and with the ridge, exactly
    kept = torch.cat([rows[:, KEEP], ridge.sqrt() * torch.eye(4, dtype=torch.float64)])
    dropped = torch.cat([rows[:, DROPPED], torch.zeros(4, 3, dtype=torch.float64)])
    torch.testing.assert_close(G, torch.linalg.lstsq(kept, dropped).solution.mT, rtol=1e-9, atol=1e-9)


def test_compensation_does_not_depend_on_the_amount_of_data():
    covariance = measure(random_scan()).gated_covariance
    torch.testing.assert_close(compensation(1e6 * covariance, KEEP), compensation(covariance, KEEP))


def test_dropping_a_combination_of_kept_states_costs_nothing_once_compensated():
    scan = random_scan()
    scan["A"][:, 6] = scan["A"][:, 2] = scan["A"][:, 4]
    scan["B"][:, 6] = 0.5 * scan["B"][:, 2] - 2 * scan["B"][:, 4]
    keep = torch.arange(6)
    G = compensation(measure(scan).gated_covariance, keep)

    def kept_output(C):
        return gated_output(scan | {"A": scan["A"][:, keep], "B": scan["B"][:, keep], "C": C})

    y, C = gated_output(scan), scan["C"]
    plain = kept_output(C[:, keep])
    compensated = kept_output(C[:, keep] + G.mT @ C[:, 6:])
    assert (plain - y).norm() > 0.1 * y.norm()
    assert (compensated - y).norm() < 1e-3 * y.norm()


@pytest.mark.parametrize("copies", [1, 2])
def test_compensation_survives_dead_and_collinear_states(copies):
    row = normal(1, 7) * (copies - 1)  # all zero, or of rank one
    assert torch.isfinite(compensation(row.mT @ row, KEEP)).all()


@pytest.mark.parametrize("size", [1, 3, 6])
def test_the_unexplained_share_is_what_least_squares_leaves_of_a_state(size):
    states = normal(200, 7) + normal(200, 1, seed=1)  # one thing that all of them know
    keep = torch.tensor([0, 2, 3, 4, 5, 6])[:size]
    dropped = complement(keep, 7)
    solution = torch.linalg.lstsq(states[:, keep], states[:, dropped]).solution
    left = (states[:, dropped] - states[:, keep] @ solution).square().sum(0) / states[:, dropped].square().sum(0)
    torch.testing.assert_close(unexplained_shares(states.T @ states, keep), left, rtol=1e-3, atol=0)
