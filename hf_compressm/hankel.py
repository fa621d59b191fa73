"""Hankel singular values of time-invariant systems, and the rank that a tolerance asks for.

Mathematics only: tensors in, tensors out, float64 throughout.
"""

import torch
from torch import Tensor


def hankel_singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """Hankel singular values of a system with controllability Gramian P and observability Gramian Q.

    They are the singular values of L_Qᴴ L_P with P = L_P L_Pᴴ and Q = L_Q L_Qᴴ. The factors come from an
    eigendecomposition, which survives Gramians that are semi-definite in floating point, where `sqrt(eig(P Q))`
    would turn round-off into imaginary values.

    Args:
        P: Hermitian positive semi-definite, (..., N, N).
        Q: Hermitian positive semi-definite, (..., N, N).

    Returns:
        σ, float64, (..., N), descending.

    Raises:
        ValueError: a Gramian is not finite, or is indefinite by more than round-off.

    Source: Antoulas, *Approximation of Large-Scale Dynamical Systems* (2005), chapter 7.
    """
    return torch.linalg.svdvals(_gramian_factor(Q, "Q").mH @ _gramian_factor(P, "P"))


def _gramian_factor(gramian: Tensor, name: str) -> Tensor:
    """L with L Lᴴ = gramian, (..., N, N)."""
    gramian = gramian.to(torch.complex128 if gramian.is_complex() else torch.float64)
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
    return vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)


def truncation_rank(sigma: Tensor, tolerance: float, min_reduction: float = 0.05) -> int | Tensor:
    """Smallest rank that discards at most the share τ of the energy: r(τ) = min {r : Σ_{i>r} σ_i ≤ τ Σσ}.

    Args:
        sigma: energies, descending and not negative, (..., N).
        tolerance: τ, the share that may be discarded, in (0, 1).
        min_reduction: the gate: N is kept unless r < (1 - min_reduction) N.

    Returns:
        r in 1 … N: an int for a single spectrum, an integer tensor (...) for a batch of them.

    Raises:
        ValueError: tolerance outside (0, 1), or a spectrum that is not finite, negative or ascending.

    Source: Chahine et al., arXiv 2510.02823.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}: it is the share of the energy to discard.")
    sigma = sigma.to(torch.float64)
    if not torch.isfinite(sigma).all() or (sigma < 0).any() or (sigma.diff(dim=-1) > 0).any():
        raise ValueError("a spectrum must be finite, not negative and descending; sort it first.")
    state_size = sigma.shape[-1]
    discarded = sigma.flip(-1).cumsum(-1).flip(-1)  # entry i: what is lost by keeping i states
    too_few = discarded[..., 1:] > tolerance * discarded[..., :1]
    rank = 1 + too_few.sum(-1)
    rank = torch.where(rank < (1 - min_reduction) * state_size, rank, state_size)
    return int(rank) if rank.ndim == 0 else rank
