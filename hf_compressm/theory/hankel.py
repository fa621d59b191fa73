"""Time-invariant systems have exact Gramians, Hankel singular values, balanced truncations and error bounds.

    h(k+1) = A h(k) + B x(k),   y(k) = C h(k),   A stable: every eigenvalue lies inside the unit circle

This file holds mathematics only: it takes and returns tensors, in float64 or complex128 throughout, batched over
leading dimensions. A system is given by a dense A, or by the eigenvalues of a diagonal one. N is the state size, H_in
and H_out count the inputs and outputs.

Sources: Antoulas, *Approximation of Large-Scale Dynamical Systems* (2005), chapters 4 and 7; its use in training:
Chahine et al., arXiv 2510.02823.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
MAX_EIGENVECTOR_CONDITION = 1e9  # beyond it a diagonal form is wrong by more than 1e-7


class BalancingTransformation(NamedTuple):
    """In balanced coordinates both Gramians are diag(σ): A becomes `left` A `right`, B `left` B, C C `right`.

    Attributes:
        sigma: Hankel singular values, descending, (..., N).
        right: T, one column for each balanced state, (..., N, N).
        left: T⁻¹, one row for each, (..., N, N).
        rank: number of states that float64 can tell from round-off, (...); columns and rows beyond it are zero.
    """

    sigma: Tensor
    right: Tensor
    left: Tensor
    rank: Tensor


def diagonal_gramians(eigenvalues: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gramians of a diagonal system, in closed form.

    P_ij = (B Bᴴ)_ij / (1 - λ_i λ̄_j) and Q_ij = (Cᴴ C)_ij / (1 - λ̄_i λ_j) solve the Lyapunov equations of `gramians`.

    Args:
        eigenvalues: λ, real or complex, (..., N).
        B: (..., N, H_in).
        C: (..., H_out, N).

    Returns:
        (P, Q), Hermitian, (..., N, N) each.

    Raises:
        ValueError: an eigenvalue lies on or outside the unit circle, a value is NaN or Inf, or shapes do not fit.
    """
    eigenvalues, B, C = _to_double(eigenvalues, B, C)
    _check_shapes(eigenvalues.shape[-1], B, C)
    _check_stable(eigenvalues)
    rows, columns = eigenvalues.unsqueeze(-1), eigenvalues.unsqueeze(-2)
    return (B @ B.mH) / (1 - rows * columns.conj()), (C.mH @ C) / (1 - rows.conj() * columns)


def gramians(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gramians of a dense system, which solve A P Aᴴ - P + B Bᴴ = 0 and Aᴴ Q A - Q + Cᴴ C = 0.

    They come by doubling: the sum P = Σ_k Aᵏ B Bᴴ Aᵏᴴ gains as many terms as it has in each step (Smith 1968).

    Args:
        A: (..., N, N), stable.
        B: (..., N, H_in).
        C: (..., H_out, N).

    Returns:
        (P, Q), Hermitian, (..., N, N) each.

    Raises:
        ValueError: A is not square or not stable, a value is NaN or Inf, shapes do not fit, or A is so far from normal
            that its powers overflow.
    """
    A, B, C = _to_double(A, B, C)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square, (..., N, N); got {tuple(A.shape)}.")
    _check_shapes(A.shape[-1], B, C)
    if not torch.isfinite(A).all():
        raise ValueError("A holds NaN or Inf.")
    _check_stable(torch.linalg.eigvals(A))
    P, Q = B @ B.mH, C.mH @ C
    while True:
        more_P, more_Q = A @ P @ A.mH, A.mH @ Q @ A
        P, Q, A = P + more_P, Q + more_Q, A @ A
        if not all(torch.isfinite(matrix).all() for matrix in (P, Q, A)):
            raise ValueError(
                "the powers of A overflow before they decay: A is too far from normal. Rescale its states."
            )
        if not (A.abs() > EPSILON).any() and _is_negligible(more_P, P) and _is_negligible(more_Q, Q):
            return P, Q


def hankel_singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """Return the Hankel singular values of a system with controllability Gramian P and observability Gramian Q.

    They are the singular values of L_Qᴴ L_P with P = L_P L_Pᴴ and Q = L_Q L_Qᴴ. The factors come from an
    eigendecomposition, which survives Gramians that are semi-definite in floating point, where `sqrt(eig(P Q))`
    would turn round-off into imaginary values. Values below sqrt(N ε ‖P‖ ‖Q‖), with the states scaled to equal
    diagonals, are round-off: about 1e-7 σ_1.

    Args:
        P: Hermitian positive semi-definite, (..., N, N).
        Q: Hermitian positive semi-definite, (..., N, N).

    Returns:
        σ, float64, (..., N), descending.

    Raises:
        ValueError: a Gramian is not finite, or is indefinite by more than round-off.
    """
    return torch.linalg.svdvals(_cross_factor(*_equilibrate(P, Q)[:2])[2])


def balancing_transformation(P: Tensor, Q: Tensor) -> BalancingTransformation:
    """Balance a system by the square-root method: L_Qᴴ L_P = U Σ Vᴴ, T = L_P V Σ^(-1/2), T⁻¹ = Σ^(-1/2) Uᴴ L_Qᴴ.

    Args:
        P, Q: Gramians, (..., N, N) each.

    Raises:
        ValueError: a Gramian is not finite, or is indefinite by more than round-off.
    """
    P, Q, scale = _equilibrate(P, Q)
    L_P, L_Q, cross = _cross_factor(P, Q)
    U, sigma, Vh = torch.linalg.svd(cross)
    # Gramians are known to ε‖P‖ and ε‖Q‖, so σ² to ε‖P‖‖Q‖: below that, a direction is chance, and so is stability.
    floor = (sigma.shape[-1] * EPSILON * _norm(P) * _norm(Q)).sqrt()
    known = sigma > floor
    weight = torch.where(known, sigma, 1.0).rsqrt() * known
    right = scale.reciprocal().unsqueeze(-1) * (L_P @ Vh.mH) * weight.unsqueeze(-2)
    left = weight.unsqueeze(-1) * (L_Q @ U).mH * scale.unsqueeze(-2)
    return BalancingTransformation(sigma, right, left, known.sum(-1))


def balanced_truncation(eigenvalues: Tensor, B: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a diagonal system to `rank` balanced states; the result is stable and within `error_bound` of the whole.

    Args:
        eigenvalues: λ, (..., N).
        B: (..., N, H_in).
        C: (..., H_out, N).
        rank: states to keep, the same number in every system of a batch.

    Returns:
        (A_r, B_r, C_r): (..., r, r) dense, (..., r, H_in), (..., H_out, r). `diagonalize` makes it diagonal again.

    Raises:
        ValueError: `diagonal_gramians` refuses the system; the rank lies outside 1 … N, or above the number of states
            that float64 can tell from round-off (a system of that many states is the whole system already).
    """
    eigenvalues, B, C = _to_double(eigenvalues, B, C)
    balancing = balancing_transformation(*diagonal_gramians(eigenvalues, B, C))
    largest = int(balancing.rank.min()) if balancing.rank.numel() else eigenvalues.shape[-1]  # an empty batch
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank = {rank}; allowed: 1 … {largest}. Of the system's {eigenvalues.shape[-1]} states, {largest} can be "
            "told from round-off."
        )
    return project(eigenvalues, B, C, balancing.left[..., :rank, :], balancing.right[..., :rank])


def project(eigenvalues: Tensor, B: Tensor, C: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (left Λ right, left B, C right) of a diagonal system: (..., r, r), (..., r, H_in), (..., H_out, r)."""
    eigenvalues, B, C, left, right = _to_double(eigenvalues, B, C, left, right)
    return (left * eigenvalues.unsqueeze(-2)) @ right, left @ B, C @ right


def diagonalize(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a system of the same input-output behaviour with a diagonal A.

    Args:
        A: (..., N, N).
        B: (..., N, H_in).
        C: (..., H_out, N).

    Returns:
        (λ, V⁻¹ B, C V), complex128: (..., N), (..., N, H_in), (..., H_out, N).

    Raises:
        ValueError: A has no well-conditioned eigenvectors (it is defective, or nearly so), or is not finite.
    """
    A, B, C = _to_double(A, B, C)
    if not all(torch.isfinite(matrix).all() for matrix in (A, B, C)):
        raise ValueError("A, B or C holds NaN or Inf.")
    eigenvalues, vectors = torch.linalg.eig(A)
    condition = torch.linalg.cond(vectors)
    if (condition > MAX_EIGENVECTOR_CONDITION).any():
        raise ValueError(
            f"A is defective or nearly so (its eigenvectors have condition {condition.max():.1e}): it has no diagonal "
            "form that floating point could hold. Truncate to another rank."
        )
    return eigenvalues, torch.linalg.solve(vectors, B.to(vectors.dtype)), C.to(vectors.dtype) @ vectors


def truncation_rank(sigma: Tensor, tolerance: float, min_reduction: float = 0.05) -> int | Tensor:
    """Return the smallest rank that discards at most the share τ of Σσ: r(τ) = min {r : Σ_{i>r} σ_i ≤ τ Σσ}.

    Args:
        sigma: singular values or scores, descending and not negative, (..., N).
        tolerance: τ, the share that may be discarded, in (0, 1).
        min_reduction: the gate: N is kept unless r < (1 - min_reduction) N.

    Returns:
        r in 1 … N: an int for a single spectrum, an integer tensor (...) for a batch of them.

    Raises:
        ValueError: the tolerance lies outside (0, 1), or a spectrum is not finite, negative or ascending.

    Source: Chahine et al., arXiv 2510.02823.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}: it is the share of Σσ to discard.")
    sigma = sigma.to(torch.float64)
    if not torch.isfinite(sigma).all() or (sigma < 0).any() or (sigma.diff(dim=-1) > 0).any():
        raise ValueError("a spectrum must be finite, not negative and descending; sort it first.")
    state_size = sigma.shape[-1]
    too_few = _tails(sigma)[..., 1:-1] > tolerance * _tails(sigma)[..., :1]
    rank = 1 + too_few.sum(-1)
    rank = torch.where(rank < (1 - min_reduction) * state_size, rank, state_size)
    return int(rank) if rank.ndim == 0 else rank


def error_bound(sigma: Tensor, rank: int) -> Tensor:
    """Return 2 Σ_{i>r} σ_i, which bounds ‖G - G_r‖_∞, the largest gain of the error at any frequency.

    Args:
        sigma: descending, (..., N).
        rank: states kept, 0 … N.

    Returns:
        float64, (...).

    Source: Enns (1984); Glover (1984); in discrete time Hinrichsen and Pritchard (1990).
    """
    if not 0 <= rank <= sigma.shape[-1]:
        raise ValueError(f"rank = {rank}; allowed: 0 … {sigma.shape[-1]}.")
    return 2 * _tails(sigma.to(torch.float64))[..., rank]


def weyl_bound(P: Tensor, Q: Tensor, P_next: Tensor, Q_next: Tensor) -> Tensor:
    """Return max |λ(H' - H)|, which bounds how far any Hankel singular value moved between two points of training.

    H = (P^½ Q P^½)^½ has the eigenvalues σ, so by Weyl's theorem |σ_i' - σ_i| ≤ ‖H' - H‖ for every i.

    Args:
        P, Q, P_next, Q_next: Gramians before and after, in the same coordinates, (..., N, N) each.

    Returns:
        float64, (...).

    Source: Chahine et al., arXiv 2510.02823.
    """
    return torch.linalg.eigvalsh(_hankel_operator(P_next, Q_next) - _hankel_operator(P, Q)).abs().amax(-1)


def hankel_nuclear_norm(eigenvalues: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return Σσ, the Hankel nuclear norm of a diagonal system, differentiable once.

    As a regulariser it favours few states. Since dΣσ = ½ tr(T⁻ᴴ T⁻¹ dP) + ½ tr(T Tᴴ dQ), neither a Lyapunov solver nor
    the eigenvalues of P Q are differentiated, and repeated or vanishing σ do no harm.

    Args:
        eigenvalues: λ, (..., N).
        B: (..., N, H_in).
        C: (..., H_out, N).

    Returns:
        float64, (...).

    Raises:
        ValueError: `diagonal_gramians` refuses the system.
    """
    return _NuclearNorm.apply(*diagonal_gramians(eigenvalues, B, C))


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, P: Tensor, Q: Tensor) -> Tensor:
        """Return Σσ from L_Pᴴ Q L_P = V Σ² Vᴴ with T = L_P V Σ^(-1/2), T⁻¹ = Σ⁻¹ Tᴴ Q; this is faster than an SVD."""
        P, Q, scale = _equilibrate(P, Q)
        L_P = _gramian_factor(P, "P")
        square, V = torch.linalg.eigh(L_P.mH @ Q @ L_P)
        sigma = square.clamp_min(0).sqrt()
        known = square > sigma.shape[-1] * EPSILON * _norm(P) * _norm(Q)
        weight = torch.where(known, sigma, 1.0).rsqrt() * known
        right = (L_P @ V) * weight.unsqueeze(-2)
        left = weight.square().unsqueeze(-1) * (right.mH @ Q)
        right, left = right / scale.unsqueeze(-1), left * scale.unsqueeze(-2)
        ctx.save_for_backward(left.mH @ left, right @ right.mH)
        return sigma.sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            raise NotImplementedError("hankel_nuclear_norm has no second derivative: use create_graph=False.")
        return tuple(0.5 * grad[..., None, None] * sensitivity for sensitivity in ctx.saved_tensors)


def _to_double(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return all of them in complex128 if one is complex, else all in float64."""
    dtype = torch.complex128 if any(tensor.is_complex() for tensor in tensors) else torch.float64
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check_shapes(state_size: int, B: Tensor, C: Tensor) -> None:
    if state_size < 1 or B.ndim < 2 or C.ndim < 2 or B.shape[-2] != state_size or C.shape[-1] != state_size:
        raise ValueError(
            f"a system of {state_size} states has B {tuple(B.shape)} and C {tuple(C.shape)}; give B (..., N, inputs) "
            "and C (..., outputs, N) with N at least 1."
        )
    if not (torch.isfinite(B).all() and torch.isfinite(C).all()):
        raise ValueError("B or C holds NaN or Inf.")


def _check_stable(eigenvalues: Tensor) -> None:
    moduli = eigenvalues.detach().abs()
    if not (moduli < 1).all():
        modulus = moduli.amax()
        raise ValueError(
            f"the system is unstable: an eigenvalue has modulus {modulus:.6g}, and only below 1 are there Gramians."
        )


def _is_negligible(change: Tensor, gramian: Tensor) -> bool:
    """Return whether the change is below round-off in every state, in that state's own unit."""
    change, whole = (torch.diagonal(matrix, dim1=-2, dim2=-1).abs() for matrix in (change, gramian))
    return not (change > EPSILON * whole).any()


def _equilibrate(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the states so that the diagonals of both Gramians are equal; return P, Q and the scaling, (..., N).

    That changes no σ, and keeps round-off from hiding a state that was merely given in small units.
    """
    P, Q = _to_double(P, Q)
    diagonals = (torch.diagonal(gramian, dim1=-2, dim2=-1).real for gramian in (P, Q))
    p, q = (diagonal.clamp_min(0).nan_to_num(0, 0, 0).sqrt() for diagonal in diagonals)
    product = p * q
    known = product > 0
    typical = product.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp_min(1)
    # A state that is controllable but not observable, or observable but not controllable, gets the mean of the others.
    product = torch.where(known, product, torch.where(typical > 0, typical, 1.0))
    scale = torch.where(p > 0, product.sqrt() / p, torch.where(q > 0, q / product.sqrt(), 1.0))
    rows, columns = scale.unsqueeze(-1), scale.unsqueeze(-2)
    return P * rows * columns, Q / rows / columns, scale


def _cross_factor(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return L_P, L_Q and L_Qᴴ L_P, (..., N, N) each."""
    L_P, L_Q = _gramian_factor(P, "P"), _gramian_factor(Q, "Q")
    return L_P, L_Q, L_Q.mH @ L_P


def _hankel_operator(P: Tensor, Q: Tensor) -> Tensor:
    """Return H = (P^½ Q P^½)^½ = V Σ Vᴴ with L_Qᴴ P^½ = U Σ Vᴴ, (..., N, N)."""
    P, Q = _to_double(P, Q)
    vectors, roots = _eigen_factors(P, "P")
    root = (vectors * roots.unsqueeze(-2)) @ vectors.mH
    _, sigma, Vh = torch.linalg.svd(_gramian_factor(Q, "Q").mH @ root)
    return (Vh.mH * sigma.unsqueeze(-2)) @ Vh


def _norm(gramian: Tensor) -> Tensor:
    """Return ‖gramian‖_∞, (..., 1)."""
    return gramian.abs().sum(-1).amax(-1, keepdim=True)


def _gramian_factor(gramian: Tensor, name: str) -> Tensor:
    """Return L with L Lᴴ = gramian, (..., N, N)."""
    vectors, roots = _eigen_factors(gramian, name)
    return vectors * roots.unsqueeze(-2)


def _eigen_factors(gramian: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return eigenvectors (..., N, N) and roots of the eigenvalues (..., N); those that are round-off become zero."""
    if not torch.isfinite(gramian).all():
        raise ValueError(
            f"Gramian {name} holds NaN or Inf: the system it came from is unstable or its weights diverged."
        )
    eigenvalues, vectors = torch.linalg.eigh(gramian)
    round_off = 1e-8 * eigenvalues.abs().amax(-1, keepdim=True)
    if (eigenvalues < -round_off).any():
        raise ValueError(
            f"Gramian {name} is indefinite (smallest eigenvalue {eigenvalues.min():.3e}); a Gramian is positive "
            "semi-definite, so check that it was built from a stable system."
        )
    return vectors, eigenvalues.clamp_min(0).sqrt()


def _tails(sigma: Tensor) -> Tensor:
    """Return Σ_{i>r} σ_i for r = 0 … N, (..., N + 1)."""
    return torch.nn.functional.pad(sigma.flip(-1).cumsum(-1).flip(-1), (0, 1))
