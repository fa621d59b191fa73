"""Balanced truncation says how much a cut costs: against golden values, dense references and the theorems themselves.

The risk is a silent one. A conjugation that is dropped, a Gramian taken for the other or a state that is round-off
gives a smaller model which runs, is stable on most days, and is wrong by a few per cent.
"""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import solve_discrete_lyapunov

from hf_compressm.theory.hankel import (
    balanced_truncation,
    balancing_transformation,
    diagonal_gramians,
    diagonalize,
    error_bound,
    gramians,
    hankel_nuclear_norm,
    hankel_singular_values,
    project,
    truncation_rank,
    weyl_bound,
)

GOLDEN = Path(__file__).parent.parent / "data" / "lru_balanced_truncation.npz"
REAL_AND_COMPLEX = [torch.float64, torch.complex128]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_system(
    state_size, inputs=2, outputs=3, batch=(), dtype=torch.complex128, fastest=0.0, slowest=0.9999, seed=0
):
    """λ, B, C: time constants spread evenly in their logarithm, phases (or signs) at random."""
    seed = 10 * seed
    slowness = uniform(*batch, state_size, seed=seed)
    moduli = 1 - (1 - fastest) * ((1 - slowest) / (1 - fastest)) ** slowness
    angle = uniform(*batch, state_size, seed=seed + 1)
    eigenvalues = torch.polar(moduli, 2 * torch.pi * angle) if dtype.is_complex else moduli * (angle - 0.3).sign()
    B = normal(*batch, state_size, inputs, seed=seed + 2, dtype=dtype)
    return eigenvalues, B, normal(*batch, outputs, state_size, seed=seed + 3, dtype=dtype)


def random_matrix(state_size, radius, seed, dtype):
    """Dense, not normal, with the spectral radius given."""
    A = normal(state_size, state_size, seed=seed, dtype=dtype)
    return A * radius / torch.linalg.eigvals(A).abs().max()


def in_coordinates(T, eigenvalues, B, C):
    """The same system with the state T h: dense A, B, C."""
    inverse = torch.linalg.inv(T)
    return T @ torch.diag(eigenvalues) @ inverse, T @ B, C @ inverse


def spectrum(eigenvalues, B, C):
    return hankel_singular_values(*diagonal_gramians(eigenvalues, B, C))


def transfer(z, eigenvalues, B, C):
    """C (z I - Λ)⁻¹ B, (..., K, H_out, H_in) at the K points z (..., K)."""
    resolvent = 1 / (z.unsqueeze(-1) - eigenvalues.unsqueeze(-2))
    return (C.unsqueeze(-3) * resolvent.unsqueeze(-2)) @ B.unsqueeze(-3).to(resolvent.dtype)


def dense_transfer(z, A, B, C):
    """C (z I - A)⁻¹ B, (..., K, H_out, H_in) at the K points z (..., K)."""
    A, B, C = (matrix.to(torch.complex128).unsqueeze(-3) for matrix in (A, B, C))
    identity = torch.eye(A.shape[-1], dtype=torch.complex128)
    return C @ torch.linalg.solve(z[..., None, None] * identity - A, B)


def frequencies(*eigenvalues, points=64):
    """On the unit circle: evenly spread, and in the direction of each eigenvalue, where the gain has its peaks."""
    grid = torch.arange(points, dtype=torch.float64) * (2 * torch.pi / points)
    angles = [grid.expand(*eigenvalues[0].shape[:-1], points), *(poles.angle() for poles in eigenvalues)]
    angles = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angles), angles)


def largest_gain(transfer_function):
    return torch.linalg.matrix_norm(transfer_function, 2).amax(-1)


def assert_near(actual, expected, tolerance, scale=None):
    """Within a share of the largest value, or of `scale`."""
    assert actual.shape == expected.shape
    scale = expected.abs().max() if scale is None else scale
    assert (actual - expected).abs().max() <= tolerance * scale


# Golden values


@pytest.fixture(params=range(5))
def golden(request) -> dict:
    with np.load(GOLDEN) as arrays:
        prefix = f"case{request.param}/"
        return {
            name.removeprefix(prefix): torch.from_numpy(np.array(value))
            for name, value in arrays.items()
            if name.startswith(prefix)
        }


def test_golden_spectra_ranks_and_bounds(golden):
    sigma = spectrum(golden["eigenvalues"], golden["B"], golden["C"])
    assert_near(sigma, golden["hsv"], 1e-8)
    shares = 1 - golden["kept_energy"]
    assert [truncation_rank(sigma, float(share), min_reduction=0) for share in shares] == golden["ranks"].tolist()
    assert_near(error_bound(sigma, int(golden["rank"])), golden["bound"], 1e-8, scale=sigma[0])


def test_golden_reduced_systems(golden):
    system = golden["eigenvalues"], golden["B"], golden["C"]
    assert_near(transfer(golden["z"], *system), golden["transfer_full"], 1e-12)
    dense = balanced_truncation(*system, int(golden["rank"]))
    reduced = diagonalize(*dense)
    for response in (dense_transfer(golden["z"], *dense), transfer(golden["z"], *reduced)):
        assert_near(response, golden["transfer_reduced"], 1e-6)
    distance = (reduced[0].unsqueeze(1) - golden["reduced_eigenvalues"]).abs()
    assert distance.amin(0).max() < 1e-6 and distance.amin(1).max() < 1e-6


# Gramians


def lyapunov_solution(A, right_hand_side):
    """X with A X Aᴴ - X + right_hand_side = 0."""
    A, right_hand_side = (matrix.resolve_conj().numpy() for matrix in (A, right_hand_side))
    return torch.from_numpy(solve_discrete_lyapunov(A, right_hand_side, method="direct"))


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("radius", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("state_size", [1, 2, 5, 7, 13])
def test_gramians_of_a_dense_system_solve_its_lyapunov_equations(state_size, radius, dtype):
    A = random_matrix(state_size, radius, seed=state_size, dtype=dtype)
    B, C = normal(state_size, 2, seed=1, dtype=dtype), normal(3, state_size, seed=2, dtype=dtype)
    P, Q = gramians(A, B, C)
    assert_near(P, lyapunov_solution(A, B @ B.mH), 1e-9)
    assert_near(Q, lyapunov_solution(A.mH, C.mH @ C), 1e-9)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("state_size", [2, 5, 9])
def test_gramians_of_a_system_far_from_normal_solve_its_lyapunov_equations(state_size, dtype):
    A = 2 * normal(state_size, state_size, seed=3, dtype=dtype).triu(1)
    A = A + torch.diag(random_system(state_size, dtype=dtype, slowest=0.9)[0])
    if state_size == 2:  # 0.9 twice, and entries far outside the circle
        A = torch.tensor([[5.9, 5.0], [-5.0, -4.1]], dtype=dtype)
    assert torch.linalg.matrix_norm(A, 2) > 2
    B, C = normal(state_size, 2, seed=1, dtype=dtype), normal(3, state_size, seed=2, dtype=dtype)
    P, Q = gramians(A, B, C)
    assert_near(P, lyapunov_solution(A, B @ B.mH), 1e-8)
    assert_near(Q, lyapunov_solution(A.mH, C.mH @ C), 1e-8)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("state_size", [1, 2, 7, 33])
def test_gramians_of_a_diagonal_system_are_those_of_its_dense_form(state_size, dtype):
    eigenvalues, B, C = random_system(state_size, dtype=dtype)
    for closed, summed in zip(
        diagonal_gramians(eigenvalues, B, C), gramians(torch.diag(eigenvalues), B, C), strict=True
    ):
        assert closed.dtype == summed.dtype == dtype
        assert_near(closed, summed, 1e-11)
        assert_near(closed, closed.mH, 1e-11)


def delay_line(taps):
    """h(k) holds the last inputs and y(k) = Σ taps_i x(k - i): A is nilpotent."""
    length = len(taps)
    A = torch.diag(torch.ones(length - 1, dtype=torch.float64), -1)
    return A, torch.eye(length, 1, dtype=torch.float64), taps.unsqueeze(0)


TAPS = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0], dtype=torch.float64)
TAP_MATRIX = torch.stack([F.pad(TAPS[i:], (0, i)) for i in range(5)])  # its Hankel matrix


def test_a_delay_line_has_the_gramians_of_its_taps():
    P, Q = gramians(*delay_line(TAPS))
    assert torch.equal(P, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(Q, TAP_MATRIX @ TAP_MATRIX, rtol=1e-14, atol=0)


# Hankel singular values


def test_balanced_gramians_have_their_diagonal_as_spectrum():
    diagonal = torch.tensor([0.5, 3.0, 1e-3, 0.0, 2.0], dtype=torch.float64)
    sigma = hankel_singular_values(torch.diag(diagonal), torch.diag(diagonal))
    torch.testing.assert_close(sigma, diagonal.sort(descending=True).values, rtol=1e-12, atol=1e-15)


def test_a_scalar_system_has_the_known_value():
    a, b, c = 0.9, -2.0, 3.0
    P, Q = (torch.tensor([[v * v / (1 - a * a)]], dtype=torch.float64) for v in (b, c))
    assert hankel_singular_values(P, Q).item() == pytest.approx(abs(b * c) / (1 - a * a), rel=1e-14)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_singular_values_are_those_of_the_hankel_matrix(batch, dtype):
    eigenvalues, B, C = random_system(5, batch=batch, dtype=dtype, slowest=0.5)
    powers = eigenvalues.unsqueeze(-2) ** torch.arange(60).unsqueeze(-1)  # C Λᵏ B; the rest is below 1e-17
    impulse = F.pad((C.unsqueeze(-3) * powers.unsqueeze(-2)) @ B.unsqueeze(-3), (0, 0, 0, 0, 0, 59))
    hankel_matrix = torch.cat([torch.cat(impulse[..., i : i + 60, :, :].unbind(-3), -1) for i in range(60)], -2)
    sigma = spectrum(eigenvalues, B, C)
    assert sigma.shape == (*batch, 5) and sigma.dtype == torch.float64
    assert_near(sigma, torch.linalg.svdvals(hankel_matrix)[..., :5], 1e-11)


SMALL_UNITS = [1.0, 1e-6, 1.0, 1e6, 1e-6, 1.0, 1e6]
COORDINATES = {
    "rotated": lambda dtype: torch.linalg.qr(normal(7, 7, seed=7, dtype=dtype)).Q,
    "mixed": lambda dtype: normal(7, 7, seed=8, dtype=dtype),
    "in units 1e6 apart": lambda dtype: torch.diag(torch.tensor(SMALL_UNITS)).to(dtype),
    "each in units 1e6 apart": lambda dtype: torch.diag(1e6 ** torch.arange(-3.0, 4.0)).to(dtype),
    "rotated, then in units": lambda dtype: COORDINATES["in units 1e6 apart"](dtype) @ COORDINATES["rotated"](dtype),
}


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_singular_values_do_not_depend_on_the_coordinates_of_the_state(coordinates, dtype):
    system = random_system(7, dtype=dtype, slowest=0.999)
    T = COORDINATES[coordinates](dtype).to(system[1].dtype)
    sigma = spectrum(*system)
    assert_near(hankel_singular_values(*gramians(*in_coordinates(T, *system))), sigma, 1e-9)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6, 1e-6])
def test_a_delay_line_has_the_spectrum_of_its_hankel_matrix_in_any_units(ratio):
    """Five states in units that differ by the ratio from one to the next."""
    units = ratio ** torch.arange(5, dtype=torch.float64)
    A, B, C = delay_line(TAPS)
    sigma = hankel_singular_values(*gramians(A * units / units.unsqueeze(1), B / units.unsqueeze(1), C * units))
    assert_near(sigma, torch.linalg.svdvals(TAP_MATRIX), 1e-9)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
def test_singular_values_scale_with_inputs_and_outputs(dtype):
    eigenvalues, B, C = random_system(5, dtype=dtype)
    sigma = spectrum(eigenvalues, B, C)
    assert_near(spectrum(eigenvalues, 2 * B, C), 2 * sigma, 1e-10)
    assert_near(spectrum(eigenvalues, B, 3 * C), 3 * sigma, 1e-10)
    assert_near(spectrum(eigenvalues, B, torch.cat([C, C])), 2**0.5 * sigma, 1e-10)
    assert_near(spectrum(eigenvalues, torch.cat([B, B, B], 1), C), 3**0.5 * sigma, 1e-10)
    assert_near(spectrum(eigenvalues.conj(), C.mH, B.mH), sigma, 1e-10)  # the dual system


def test_semi_definite_gramians_give_zeros_and_no_nan():
    b, Q = normal(7), torch.eye(7, dtype=torch.float64)
    sigma = hankel_singular_values(torch.outer(b, b), Q)  # its eigenvalues in floating point are partly negative
    torch.testing.assert_close(sigma[0], b.norm())
    assert (sigma[1:] >= 0).all() and (sigma[1:] < 1e-7 * sigma[0]).all()
    assert (hankel_singular_values(torch.zeros(7, 7), Q) == 0).all()


def test_round_off_below_zero_is_taken_for_zero():
    gramian = torch.tensor([4.0, 1.0, -1e-9], dtype=torch.float64)
    sigma = hankel_singular_values(torch.diag(gramian), torch.eye(3))
    torch.testing.assert_close(sigma, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["P", "Q"])
@pytest.mark.parametrize(
    ("defect", "message"), [(-1e-3, "indefinite"), (float("nan"), "NaN"), (float("inf"), "NaN or Inf")]
)
def test_gramians_that_are_none_are_refused_by_name(name, defect, message):
    pair = {key: torch.eye(3, dtype=torch.float64).repeat(2, 1, 1) for key in "PQ"}
    pair[name][1, 2, 2] = defect
    for function in (hankel_singular_values, balancing_transformation, lambda P, Q: weyl_bound(P, Q, P, Q)):
        with pytest.raises(ValueError, match=rf"Gramian {name} .*{message}"):
            function(**pair)


# Balanced truncation


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("state_size", [1, 2, 5, 11])
def test_all_balanced_states_are_the_whole_system_with_equal_diagonal_gramians(state_size, dtype):
    system = random_system(state_size, dtype=dtype, slowest=0.99)
    sigma, right, left, rank = balancing_transformation(*diagonal_gramians(*system))
    assert rank == state_size
    assert_near(left @ right, torch.eye(state_size, dtype=dtype), 1e-9)
    balanced = balanced_truncation(*system, state_size)
    for gramian in gramians(*balanced):
        assert_near(gramian, torch.diag(sigma).to(dtype), 1e-10)
    z = frequencies(system[0])
    assert_near(dense_transfer(z, *balanced), transfer(z, *system), 1e-9)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize(("state_size", "rank"), [(5, 2), (17, 3), (40, 8)])
def test_kept_states_are_balanced(state_size, rank, dtype):
    P, Q = diagonal_gramians(*random_system(state_size, dtype=dtype, slowest=0.999))
    sigma, right, left, known = balancing_transformation(P, Q)
    assert rank <= known
    expected = torch.diag(sigma[:rank]).to(dtype)
    left, right = left[:rank], right[:, :rank]
    assert_near(left @ P @ left.mH, expected, 1e-10)
    assert_near(right.mH @ Q @ right, expected, 1e-10)
    assert_near(left @ right, torch.eye(rank, dtype=dtype), 1e-9)


def test_truncation_is_the_leading_block_of_the_balanced_system():
    system = random_system(7)
    A, B, C = balanced_truncation(*system, 7)
    for kept, whole in zip(balanced_truncation(*system, 3), (A[:3, :3], B[:3], C[:, :3]), strict=True):
        assert_near(kept, whole, 1e-9)


def test_the_error_of_a_thousand_random_systems_stays_within_its_bound():
    tightest = 0.0
    for seed in range(40):
        state_size = 2 * (seed % 20) + 1
        inputs, outputs = 1 + seed % 5, 1 + seed // 5 % 5
        eigenvalues, B, C = random_system(state_size, inputs, outputs, batch=(25,), seed=seed)
        if seed % 4 == 0:  # peaks that overlap
            eigenvalues = torch.polar(eigenvalues.abs(), 0.02 * eigenvalues.angle())
        sigma, *_, rank = balancing_transformation(*diagonal_gramians(eigenvalues, B, C))
        largest = int(rank.min())
        for kept in {1, (largest + 1) // 2, largest}:
            reduced = balanced_truncation(eigenvalues, B, C, kept)
            poles = torch.linalg.eigvals(reduced[0])
            assert (poles.abs() < 1).all()
            z = frequencies(eigenvalues, poles, points=32)
            error = largest_gain(transfer(z, eigenvalues, B, C) - dense_transfer(z, *reduced))
            bound = error_bound(sigma, kept)
            assert (error <= bound + 1e-8 * sigma[:, 0]).all()
            tightest = max(tightest, float((error / bound.clamp_min(1e-3 * sigma[:, 0])).max()))
    assert tightest > 0.99  # half the bound would not do


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_bound_is_attained_by_a_relaxation_system(rank):
    """C = Bᵀ and real eigenvalues: every discarded state errs with the same sign at z = 1."""
    eigenvalues = 1 - torch.logspace(-2, -4, 7, dtype=torch.float64)
    B = (1 - eigenvalues.square()).sqrt().unsqueeze(-1)
    z = torch.ones(1, dtype=torch.complex128)
    error = transfer(z, eigenvalues, B, B.mT) - dense_transfer(z, *balanced_truncation(eigenvalues, B, B.mT, rank))
    sigma = spectrum(eigenvalues, B, B.mT)
    assert error_bound(sigma, rank) > 0.01 * sigma[0]
    assert 0.95 < float(error.abs() / error_bound(sigma, rank)) <= 1


def test_the_bound_is_twice_the_tail():
    sigma = torch.tensor([[8.0, 4.0, 2.0, 1.0], [4.0, 0.0, 0.0, 0.0]])
    assert [error_bound(sigma, rank).tolist() for rank in range(5)] == [[30, 8], [14, 0], [6, 0], [2, 0], [0, 0]]
    assert error_bound(sigma, 2).dtype == torch.float64


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_bound_for_a_rank_outside_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank = {rank}; allowed: 0 … 3"):
        error_bound(torch.tensor([3.0, 2.0, 1.0]), rank)


@pytest.mark.parametrize("rank", [-1, 0, 6])
def test_a_rank_outside_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank = {rank}; allowed: 1 … 5\. .* round-off"):
        balanced_truncation(*random_system(5), rank)


def test_the_rank_of_a_batch_is_limited_by_its_smallest_system():
    eigenvalues, B, C = random_system(5, batch=(2,))
    B[1, 0] = 0
    with pytest.raises(ValueError, match="rank = 5; allowed: 1 … 4"):
        balanced_truncation(eigenvalues, B, C, 5)
    assert balanced_truncation(eigenvalues, B, C, 4)[0].shape == (2, 4, 4)


@pytest.mark.parametrize(("single", "double"), [(torch.float32, torch.float64), (torch.complex64, torch.complex128)])
def test_single_precision_is_raised_to_double_and_real_systems_stay_real(single, double):
    system = [part.to(single) for part in random_system(5, dtype=double)]
    raised = [part.to(double) for part in system]
    for function in (diagonal_gramians, lambda *parts: balanced_truncation(*parts, 3)):
        for result, expected in zip(function(*system), function(*raised), strict=True):
            assert result.dtype == double
            assert_near(result, expected, 1e-9)


def test_one_complex_part_makes_the_system_complex():
    eigenvalues, B, C = random_system(5)
    mixed, expected = (eigenvalues, B.real, C.real), (eigenvalues, B.real + 0j, C.real + 0j)
    for part, whole in zip(balanced_truncation(*mixed, 3), balanced_truncation(*expected, 3), strict=True):
        assert part.dtype == torch.complex128
        assert_near(part, whole, 1e-9)
    _, right, left, _ = balancing_transformation(*diagonal_gramians(*mixed))
    for part, whole in zip(project(*mixed, left, right), project(*expected, left, right), strict=True):
        assert part.dtype == torch.complex128
        assert_near(part, whole, 1e-9)


# Diagonal form


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("state_size", [1, 2, 7, 32])
def test_a_diagonal_form_has_the_same_behaviour(state_size, dtype):
    A = random_matrix(state_size, 0.99, seed=state_size, dtype=dtype)
    B, C = normal(state_size, 2, seed=1, dtype=dtype), normal(3, state_size, seed=2, dtype=dtype)
    diagonal = diagonalize(A, B, C)
    assert {part.dtype for part in diagonal} == {torch.complex128}
    z = frequencies(diagonal[0])
    assert_near(transfer(z, *diagonal), dense_transfer(z, A, B, C), 1e-10)


@pytest.mark.parametrize("gap", [1e-3, 1e-6])
def test_close_eigenvalues_have_a_diagonal_form_as_long_as_it_is_accurate(gap):
    A = torch.tensor([[0.5, 1.0], [0.0, 0.5 + gap]], dtype=torch.float64)
    B, C = normal(2, 2, seed=1), normal(3, 2, seed=2)
    z = frequencies(torch.linalg.eigvals(A))
    assert_near(transfer(z, *diagonalize(A, B, C)), dense_transfer(z, A, B, C), 1e-13 / gap)


@pytest.mark.parametrize("corner", [1.0, 1e-3, -1e3])
@pytest.mark.parametrize("eigenvalue", [0.0, 0.5, 0.9])
def test_a_defective_matrix_is_refused(eigenvalue, corner):
    A = torch.diag(torch.tensor([eigenvalue, eigenvalue, 0.1], dtype=torch.float64))
    A[0, 1] = corner
    batch = torch.stack([torch.eye(3, dtype=torch.float64), A])
    for refused in (A, batch):
        with pytest.raises(ValueError, match="A is defective or nearly so.*Truncate to another rank"):
            diagonalize(refused, torch.ones(3, 1), torch.ones(1, 3))


@pytest.mark.parametrize("position", range(3))
def test_a_diagonal_form_of_what_is_not_finite_is_refused(position):
    system = [torch.eye(2), torch.ones(2, 1), torch.ones(1, 2)]
    system[position][0, 0] = float("nan")
    with pytest.raises(ValueError, match="A, B or C holds NaN or Inf"):
        diagonalize(*system)


# Edges


def single_input(eigenvalues):
    state_size, dtype = len(eigenvalues), eigenvalues.dtype
    return eigenvalues, normal(state_size, 1, dtype=dtype), normal(1, state_size, seed=1, dtype=dtype)


def clustered(center):
    return single_input(center * (1 - 1e-2 * uniform(64)))


def with_zeros(B_rows=(), C_columns=(), state_size=7):
    eigenvalues, B, C = random_system(state_size, slowest=0.99)
    B[list(B_rows)], C[:, list(C_columns)] = 0, 0
    return eigenvalues, B, C


def scaled(unit):
    eigenvalues, B, C = random_system(5)
    return eigenvalues, unit * B, unit * C


HARD_SYSTEMS = {  # and how many states float64 can know of; None: fewer than all, how many is not certain
    "one state": (lambda: random_system(1), 1),
    "one state, real": (lambda: random_system(1, 1, 1, dtype=torch.float64), 1),
    "modulus 0.9999": (lambda: random_system(5, fastest=0.9999), 5),
    "modulus 1 - 1e-9": (lambda: random_system(5, fastest=1 - 1e-9, slowest=1 - 1e-9), 5),
    "modulus 1 - 1e-9, one input": (lambda: single_input(1 - 1e-9 * torch.arange(1.0, 65.0).double()), None),
    "all eigenvalues zero": (lambda: single_input(torch.zeros(5, dtype=torch.float64)), 1),
    "eigenvalues repeated, one input": (lambda: single_input(torch.tensor([0.9, 0.9, 0.9, -0.5, -0.5j])), 3),
    "eigenvalues repeated, two inputs": (lambda: (torch.full((5,), 0.9), *random_system(5, 2, 3)[1:]), 2),
    "all eigenvalues equal": (lambda: single_input(torch.full((64,), 0.9999, dtype=torch.float64)), 1),
    "64 clustered, one input": (lambda: clustered(0.99), None),
    "64 clustered, one input, complex": (lambda: clustered(0.9 + 0.4j), None),
    "64 spread, one input": (lambda: single_input(torch.linspace(-0.999, 0.999, 64, dtype=torch.float64)), None),
    "out of reach": (lambda: with_zeros(B_rows=[0, 3]), 5),
    "out of sight": (lambda: with_zeros(C_columns=[1]), 6),
    "some out of reach, others out of sight": (lambda: with_zeros([0, 3], [1, 2, 3]), 3),
    "nothing reached": (lambda: with_zeros(B_rows=range(7)), 0),
    "nothing seen": (lambda: with_zeros(C_columns=range(7)), 0),
    "what is reached is not seen": (lambda: with_zeros([0, 1, 2], [3, 4, 5, 6]), 0),
    "weights of 1e-30": (lambda: scaled(1e-30), 5),
}


@pytest.fixture(params=HARD_SYSTEMS)
def hard_system(request):
    build, states = HARD_SYSTEMS[request.param]
    return build(), states


def test_hard_systems_have_finite_spectra_and_a_known_number_of_states(hard_system):
    system, states = hard_system
    P, Q = diagonal_gramians(*system)
    balancing = balancing_transformation(P, Q)
    assert all(torch.isfinite(part).all() for part in balancing)
    assert torch.equal(balancing.sigma.sort(descending=True).values, balancing.sigma) and (balancing.sigma >= 0).all()
    assert_near(hankel_singular_values(P, Q), balancing.sigma, 1e-12)
    known = int(balancing.rank)
    assert known == states if states is not None else 1 <= known < len(balancing.sigma)
    assert (balancing.left[known:] == 0).all() and (balancing.right[:, known:] == 0).all()
    assert weyl_bound(P, Q, P, Q) <= 1e-7 * balancing.sigma[0]


def test_hard_systems_are_cut_to_stable_ones_within_the_bound(hard_system):
    system, _ = hard_system
    balancing = balancing_transformation(*diagonal_gramians(*system))
    known = int(balancing.rank)
    round_off = 1e-8 + 1e-14 / (1 - system[0].abs().double().amax())  # that of λ, at the peak
    for rank in range(1, known + 1):
        reduced = balanced_truncation(*system, rank)
        poles = torch.linalg.eigvals(reduced[0])
        assert (poles.abs() < 1).all()
        z = frequencies(system[0].to(torch.complex128), poles)
        error = largest_gain(transfer(z, *system) - dense_transfer(z, *reduced))
        assert error <= error_bound(balancing.sigma, rank) + round_off * balancing.sigma[0]
    with pytest.raises(ValueError, match=rf"rank = {known + 1}; allowed: 1 … {known}\."):
        balanced_truncation(*system, known + 1)


def test_states_beyond_the_known_ones_are_idle(hard_system):
    system, _ = hard_system
    _, right, left, known = balancing_transformation(*diagonal_gramians(*system))
    A, B, C = project(*system, left, right)
    idle = torch.arange(len(A)) >= known
    assert not (A[idle].any() or A[:, idle].any() or B[idle].any() or C[:, idle].any())


def test_hard_systems_have_a_finite_gradient(hard_system):
    leaves = [part.clone().requires_grad_() for part in hard_system[0]]
    value = hankel_nuclear_norm(*leaves)
    value.backward()
    assert torch.isfinite(value) and all(torch.isfinite(leaf.grad).all() for leaf in leaves)


GOOD = {"eigenvalues": torch.tensor([0.5, -0.25]), "B": torch.ones(2, 3), "C": torch.ones(1, 2)}
NAN, INF = float("nan"), float("inf")
REFUSED = [
    ({"eigenvalues": torch.tensor([0.5, 1.5])}, "unstable: an eigenvalue has modulus 1.5"),
    ({"eigenvalues": torch.tensor([0.5, 1.0])}, "unstable: an eigenvalue has modulus 1,"),
    ({"eigenvalues": torch.tensor([0.5, -1.0])}, "unstable: an eigenvalue has modulus 1,"),
    ({"eigenvalues": torch.tensor([0.5, 1j])}, "unstable: an eigenvalue has modulus 1,"),
    ({"eigenvalues": torch.tensor([[0.5, 0.2], [0.5, -2.0]])}, "unstable: an eigenvalue has modulus 2"),
    ({"B": torch.tensor([[1.0], [NAN]])}, "B or C holds NaN or Inf"),
    ({"C": torch.tensor([[1.0, INF]])}, "B or C holds NaN or Inf"),
    ({"B": torch.ones(3, 2)}, "a system of 2 states has B (3, 2) and C (1, 2); give B (..., N, inputs)"),
    ({"C": torch.ones(2, 1)}, "a system of 2 states has B (2, 3) and C (2, 1)"),
    ({"B": torch.ones(2)}, "a system of 2 states has B (2,)"),
    ({"C": torch.ones(2)}, "C (2,)"),
    ({"eigenvalues": torch.ones(0), "B": torch.ones(0, 1), "C": torch.ones(1, 0)}, "N at least 1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_systems_without_gramians_are_refused(change, message):
    system = GOOD | change
    dense = {"A": torch.diag_embed(system["eigenvalues"]), "B": system["B"], "C": system["C"]}
    for function in (diagonal_gramians, hankel_nuclear_norm, lambda **parts: balanced_truncation(**parts, rank=1)):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(**system)
    with pytest.raises(ValueError, match=re.escape(message)):
        gramians(**dense)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("radius", [1.001, 3.0])
def test_a_dense_system_is_judged_by_its_eigenvalues(radius, dtype):
    unstable = random_matrix(5, radius, seed=0, dtype=dtype)
    for A in (unstable, torch.stack([unstable / 4, unstable])):
        with pytest.raises(ValueError, match=f"unstable: an eigenvalue has modulus {radius:g}"):
            gramians(A, torch.ones(5, 1), torch.ones(1, 5))


@pytest.mark.parametrize("defect", [NAN, INF])
def test_eigenvalues_that_are_not_finite_are_refused(defect):
    for eigenvalues in (torch.tensor([0.5, defect]), torch.tensor([0.5, complex(0, defect)])):
        with pytest.raises(ValueError, match="modulus (nan|inf)"):
            diagonal_gramians(eigenvalues, GOOD["B"], GOOD["C"])


@pytest.mark.parametrize("position", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("defect", [NAN, INF])
def test_a_dense_matrix_that_is_not_finite_is_refused(defect, position):
    A = torch.diag(GOOD["eigenvalues"])
    A[position] = defect
    with pytest.raises(ValueError, match="(?i)nan|inf"):
        gramians(A, GOOD["B"], GOOD["C"])


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 3)])
def test_a_matrix_that_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match=r"A must be square, \(\.\.\., N, N\); got"):
        gramians(torch.zeros(shape), GOOD["B"], GOOD["C"])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_matrix_whose_powers_overflow_is_refused(sign):
    """Two paths from the last state to the first, each of gain 1e320; with opposite signs they make Inf - Inf."""
    A = torch.zeros(4, 4, dtype=torch.float64)
    A[0, 1] = A[0, 2] = A[1, 3] = 1e160
    A[2, 3] = sign * 1e160
    B, C = torch.tensor([[0.0], [0.0], [0.0], [1e-120]]).double(), torch.tensor([[1e-120, 0.0, 0.0, 0.0]]).double()
    with pytest.raises(ValueError, match="overflow before they decay"):
        gramians(A, B, C)


# Rank


def brute_force_rank(sigma, tolerance):
    total = sum(sigma)
    return min(r for r in range(1, len(sigma) + 1) if sum(sigma[r:]) <= tolerance * total)


@pytest.mark.parametrize("tolerance", [1e-9, 0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_the_rank_is_the_smallest_that_discards_at_most_the_tolerance(size, tolerance):
    spectra = normal(9, size).exp().pow(3).sort(descending=True).values
    expected = [brute_force_rank(sigma.tolist(), tolerance) for sigma in spectra]
    ranks = truncation_rank(spectra, tolerance, min_reduction=0)
    assert ranks.tolist() == expected and ranks.dtype == torch.int64
    for sigma, rank in zip(spectra, expected, strict=True):
        single = truncation_rank(sigma, tolerance, min_reduction=0)
        assert type(single) is int and single == rank


@pytest.mark.parametrize(("tolerance", "rank"), [(0.124, 3), (0.125, 2), (0.249, 2), (0.25, 1)])
def test_the_share_that_is_discarded_may_equal_the_tolerance(tolerance, rank):
    assert truncation_rank(torch.tensor([6.0, 1.0, 1.0]), tolerance) == rank


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (18, 18), (19, 20), (20, 20)])
def test_the_gate_keeps_all_states_unless_enough_would_go(rank, expected):
    sigma = torch.cat([torch.ones(rank), torch.zeros(20 - rank)])
    assert truncation_rank(sigma, 1e-6) == expected
    assert truncation_rank(sigma, 1e-6, min_reduction=0) == rank
    assert truncation_rank(torch.stack([sigma, sigma]), 1e-6).tolist() == [expected] * 2


def test_a_spectrum_of_zeros_keeps_one_state():
    assert truncation_rank(torch.zeros(5), 0.1) == 1


@pytest.mark.parametrize("tolerance", [0, 1, -0.1, 1.5, NAN])
def test_a_tolerance_that_is_no_share_is_refused(tolerance):
    with pytest.raises(ValueError, match=r"tolerance must lie in \(0, 1\)"):
        truncation_rank(torch.tensor([2.0, 1.0]), tolerance)


@pytest.mark.parametrize("sigma", [[2.0, NAN], [INF, 1.0], [1.0, -1.0], [1.0, 2.0]])
def test_a_spectrum_that_is_none_is_refused(sigma):
    with pytest.raises(ValueError, match="finite, not negative and descending"):
        truncation_rank(torch.tensor(sigma), 0.1)


# Weyl's bound


def symmetric_root(gramian):
    values, vectors = torch.linalg.eigh(gramian)
    return (vectors * values.sqrt()) @ vectors.mH


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
def test_weyl_bound_is_the_norm_of_the_change_of_the_hankel_operator(dtype):
    operators, pairs = [], []
    for seed in range(2):
        P, Q = (part @ part.mH for part in (normal(5, 9, seed=2 * seed + i, dtype=dtype) for i in range(2)))
        root = symmetric_root(P)
        operators.append(symmetric_root(root @ Q @ root))
        pairs.append((P, Q))
    expected = torch.linalg.matrix_norm(operators[1] - operators[0], 2)
    assert_near(weyl_bound(*pairs[0], *pairs[1]), expected, 1e-10)
    assert_near(weyl_bound(*pairs[1], *pairs[0]), expected, 1e-10)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.1, 1.0, 10.0])
def test_no_singular_value_moves_farther_than_weyl_bound(size, dtype):
    for state_size in (1, 3, 8, 21):
        before = random_system(state_size, batch=(20,), dtype=dtype, slowest=0.99)
        eigenvalues, B, C = random_system(state_size, batch=(20,), dtype=dtype, slowest=0.99, seed=1)
        share = size / (1 + size)  # of the way, for λ must stay inside the circle
        after = (1 - share) * before[0] + share * eigenvalues, before[1] + size * B, before[2] + size * C
        bound = weyl_bound(*diagonal_gramians(*before), *diagonal_gramians(*after))
        sigma = spectrum(*before)
        moved = (spectrum(*after) - sigma).abs().amax(-1)
        assert bound.shape == (20,) and (moved <= bound + 1e-7 * sigma[:, 0]).all()


def test_weyl_bound_is_small_for_small_changes_and_exact_for_scaled_inputs():
    eigenvalues, B, C = random_system(7, slowest=0.99)
    before, sigma = diagonal_gramians(eigenvalues, B, C), spectrum(eigenvalues, B, C)
    assert weyl_bound(*before, *before) < 1e-7 * sigma[0]
    nearby = diagonal_gramians(eigenvalues, B + 1e-9 * normal(*B.shape, seed=9, dtype=B.dtype), C)
    assert 0 < weyl_bound(*before, *nearby) < 1e-6 * sigma[0]
    for scale in (0.5, 1.001, 3.0):
        scaled = diagonal_gramians(eigenvalues, scale * B, C)
        assert_near(weyl_bound(*before, *scaled), abs(scale - 1) * sigma[0], 1e-7, scale=sigma[0])


# Hankel nuclear norm


def leaves_of(*system):
    return [part.detach().clone().requires_grad_() for part in system]


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_the_nuclear_norm_is_the_sum_of_the_singular_values(batch, dtype):
    system = random_system(7, batch=batch, dtype=dtype)
    value = hankel_nuclear_norm(*system)
    assert value.shape == batch and value.dtype == torch.float64
    torch.testing.assert_close(value, spectrum(*system).sum(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
@pytest.mark.parametrize(
    ("state_size", "inputs", "outputs", "batch"), [(1, 1, 1, ()), (3, 1, 1, ()), (5, 2, 3, ()), (4, 3, 2, (2,))]
)
def test_the_gradient_of_the_nuclear_norm_is_that_of_finite_differences(state_size, inputs, outputs, batch, dtype):
    system = random_system(state_size, inputs, outputs, batch, dtype, slowest=0.8)
    assert torch.autograd.gradcheck(hankel_nuclear_norm, leaves_of(*system))


def test_the_gradient_of_the_nuclear_norm_has_the_type_and_shape_of_the_weights():
    eigenvalues, B, C = random_system(4, slowest=0.8)
    assert torch.autograd.gradcheck(hankel_nuclear_norm, leaves_of(eigenvalues, B.real, C))
    shared = leaves_of(eigenvalues, normal(2, 4, 3), C.real)  # and B has a batch that the others lack
    assert torch.autograd.gradcheck(hankel_nuclear_norm, shared)


def test_single_precision_weights_get_the_gradient_of_double_ones():
    leaves = leaves_of(*(part.to(torch.complex64) for part in random_system(5, slowest=0.9)))
    expected = leaves_of(*(part.to(torch.complex128) for part in leaves))
    hankel_nuclear_norm(*leaves).backward()
    hankel_nuclear_norm(*expected).backward()
    for leaf, double in zip(leaves, expected, strict=True):
        assert leaf.grad.dtype == torch.complex64
        assert_near(leaf.grad, double.grad, 1e-6)


@pytest.mark.parametrize(
    "name", ["eigenvalues repeated, one input", "eigenvalues repeated, two inputs", "64 clustered, one input"]
)
def test_the_gradient_of_the_nuclear_norm_holds_where_gramians_are_singular(name):
    leaves = leaves_of(*(part.to(torch.complex128) for part in HARD_SYSTEMS[name][0]()))
    hankel_nuclear_norm(*leaves).backward()
    system, step = [leaf.detach() for leaf in leaves], 1e-4
    for i, leaf in enumerate(leaves):
        change = step * normal(*leaf.shape, seed=5, dtype=leaf.dtype) / leaf.shape[0]
        ahead, behind = (spectrum(*system[:i], system[i] + step, *system[i + 1 :]).sum() for step in (change, -change))
        assert_near((ahead - behind) / 2, (leaf.grad.conj() * change).real.sum(), 1e-2)


def test_following_the_gradient_reduces_the_nuclear_norm():
    system = random_system(9, slowest=0.9)
    values = []
    for _ in range(20):
        leaves = leaves_of(*system)
        value = hankel_nuclear_norm(*leaves)
        value.backward()
        length = 0.05 * value.item() / sum(leaf.grad.abs().square().sum() for leaf in leaves)
        system = [leaf.detach() - length * leaf.grad for leaf in leaves]
        values.append(value.item())
    assert all(later < earlier for earlier, later in pairwise(values))
    assert values[-1] < 0.5 * values[0]


# Batches


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("dtype", REAL_AND_COMPLEX)
def test_a_batch_equals_its_systems_one_by_one(dtype):
    batch, other = (random_system(5, batch=(2, 3), dtype=dtype, slowest=0.99, seed=seed) for seed in (0, 1))
    dense = torch.diag_embed(batch[0]) + 0.01 * normal(2, 3, 5, 5, seed=9, dtype=dtype), *batch[1:]
    functions = [
        (diagonal_gramians, batch),
        (gramians, dense),
        (lambda *system: hankel_singular_values(*diagonal_gramians(*system)), batch),
        (lambda *system: balancing_transformation(*diagonal_gramians(*system))[::3], batch),  # T is free in its phases
        (lambda *system: dense_transfer(frequencies(batch[0][0, 0]), *balanced_truncation(*system, 3)), batch),
        (lambda *system: transfer(frequencies(batch[0][0, 0]), *diagonalize(*system)), dense),
        (lambda *system: error_bound(hankel_singular_values(*diagonal_gramians(*system)), 2), batch),
        (hankel_nuclear_norm, batch),
        (lambda *two: weyl_bound(*diagonal_gramians(*two[:3]), *diagonal_gramians(*two[3:])), (*batch, *other)),
    ]
    for function, arguments in functions:
        together = as_tuple(function(*arguments))
        for i, single in enumerate(zip(*(argument.flatten(0, 1) for argument in arguments), strict=True)):
            for part, whole in zip(as_tuple(function(*single)), together, strict=True):
                assert_near(part, whole.flatten(0, 1)[i], 1e-9)


def test_a_state_that_is_never_seen_does_not_hide_the_others():
    eigenvalues, B, C = (
        torch.tensor([0.5, 0.4]),
        torch.tensor([[1.0], [1e10]], dtype=torch.float64),
        torch.tensor([[1.0, 0.0]]),
    )
    B.requires_grad_()
    norm = hankel_nuclear_norm(eigenvalues, B, C)
    norm.backward()
    assert norm.item() == pytest.approx(4 / 3)
    assert B.grad[0].item() == pytest.approx(4 / 3)
    A_r, _, _ = balanced_truncation(eigenvalues, B.detach(), C, rank=1)
    assert A_r.item() == pytest.approx(0.5)
