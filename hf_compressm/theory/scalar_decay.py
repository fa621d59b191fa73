"""This file measures on data what the states of a layer with scalar decay do: Mamba-2 and its kin.

A head h of group g has a state H_t, (p, N), and one decay a_t for all of it:

    H_t = a_t H_{t-1} + Δ_t x_t B_tᵀ,     y_t = H_t C_t + D x_t

where B_t and C_t, (N,), are shared by the heads of a group. Since a_t is a scalar it commutes with every change of
basis of the state: with W and V, (r, N) each, the layer that has W B_t and V C_t in the place of B_t and C_t has the
state H_t Wᵀ at every t, exactly. Nothing accumulates, and the only error is H_t (I - WᵀV) C_t, at that moment.

With a row of H_t as a column h, and its weight w, which says what the rest of the layer makes of that channel, let

    P = E Σ_{heads, p} w h hᵀ,     Q = E[C Cᵀ]

be the Gramians of a group. If h hᵀ and C Cᵀ are uncorrelated, E Σ w |Cᵀ (I - VᵀW) h|² = ‖Q^½ (I - VᵀW) P^½‖²_F, which
balanced truncation of (P, Q) minimises, by Eckart and Young, to Σ_{i>r} σ_i². Q looks at one moment, since nothing
propagates: the Hankel singular values σ rank the error itself. It holds mathematics only; sums accumulate in float64.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .hankel import balancing_transformation, hankel_singular_values, weyl_bound


@dataclass
class GroupStatistics:
    """Group statistics are running sums over calibration tokens of one layer; those of parts of the data add up.

    States are sampled, so that sums over them have a count of their own.
    """

    tokens: Tensor  # ()         number of tokens
    input_covariance: Tensor  # (G, N, N)  B Bᵀ
    output_covariance: Tensor  # (G, N, N)  C Cᵀ = Q
    samples: Tensor  # ()         number of tokens at which states were sampled
    state_covariance: Tensor  # (G, N, N)  Σ w h hᵀ = P
    state_square: Tensor  # (G, N)     Σ h_n²
    contribution_square: Tensor  # (G, N)     Σ w (C_n h_n)²

    @classmethod
    def empty(cls, groups: int, state_size: int, device: torch.device | str = "cpu") -> "GroupStatistics":
        """Return sums over nothing, for G groups of N states."""
        vector, matrix = (groups, state_size), (groups, state_size, state_size)
        shapes = [(), matrix, matrix, (), matrix, vector, vector]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def merge(self, other: "GroupStatistics") -> "GroupStatistics":
        """Return the sums over both sets of tokens."""
        return GroupStatistics(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def accumulate_maps(self, B: Tensor, C: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            B, C: (batch, L, G, N).
            mask: 1 for tokens that count, 0 for padding, (batch, L).
        """
        counted = torch.ones(B.shape[:2], device=B.device) if mask is None else mask
        self.tokens += counted.sum()
        for total, values in ((self.input_covariance, B), (self.output_covariance, C)):
            values = values.double() * counted[:, :, None, None]
            total += torch.einsum("blgn,blgm->gnm", values, values)

    def accumulate_states(self, states: Tensor, C: Tensor, weight: Tensor, mask: Tensor | None = None) -> None:
        """Add the states at one position of each sequence of a batch.

        Args:
            states: h, (batch, G, K, N), of the K channels of all heads of each group.
            C: (batch, G, N).
            weight: w, not negative, (batch, G, K).
            mask: 1 for tokens that count, 0 for padding, (batch,).
        """
        counted = torch.ones(len(states), device=states.device) if mask is None else mask
        self.samples += counted.sum()
        h, counted = states.double(), counted.double()[:, None, None]
        weighted = h * (weight.double() * counted).sqrt().unsqueeze(-1)
        of_sequences = weighted.mT @ weighted  # Σ w h hᵀ, (batch, G, N, N)
        self.state_covariance += of_sequences.sum(0)
        self.state_square += (h.square().sum(2) * counted).sum(0)
        self.contribution_square += (of_sequences.diagonal(dim1=-2, dim2=-1) * C.double().square()).sum(0)

    @property
    def gramians(self) -> tuple[Tensor, Tensor]:
        """Return (P, Q), float64, (G, N, N) each."""
        return self.state_covariance / self.samples, self.output_covariance / self.tokens


def group_singular_values(statistics: GroupStatistics) -> Tensor:
    """Return the Hankel singular values of every group, (G, N), descending."""
    return hankel_singular_values(*statistics.gramians)


def layer_singular_values(sigma: Tensor) -> Tensor:
    """Return σ_i = sqrt(Σ_g σ_gi²) of a layer whose groups keep equally many states, (N,), descending.

    With these the expected squared error of a layer that keeps r states of each group is Σ_{i>r} σ_i².

    Args:
        sigma: of every group, (G, N), descending.
    """
    return sigma.square().sum(0).sqrt()


def balanced_projections(statistics: GroupStatistics, size: int) -> tuple[Tensor, Tensor]:
    """Return W and V by which the `size` balanced states of each group are made, float64, (G, r, N) each.

    With P = L_P L_Pᵀ, Q = L_Q L_Qᵀ and L_Qᵀ L_P = U Σ Zᵀ, W = Σ_r^-½ U_rᵀ L_Qᵀ and V = Σ_r^-½ Z_rᵀ L_Pᵀ: no Gramian is
    inverted, so they may be semi-definite. Rows beyond the rank that float64 can tell from round-off are zero.
    """
    balancing = balancing_transformation(*statistics.gramians)
    return balancing.left[:, :size], balancing.right[:, :, :size].mT


def expected_squared_error(statistics: GroupStatistics, W: Tensor, V: Tensor) -> Tensor:
    """Return ‖Q^½ (I - VᵀW) P^½‖²_F = tr (I - VᵀW)ᵀ Q (I - VᵀW) P, summed over the groups, of any W and V, ().

    Args:
        W, V: (G, r, N) each.
    """
    P, Q = statistics.gramians
    lost = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - V.to(P).mT @ W.to(P)
    return torch.einsum("gij,gjk,gkl,gil->", lost.mT, Q, lost, P)


def layer_weyl_bound(P: Tensor, Q: Tensor, P_next: Tensor, Q_next: Tensor) -> Tensor:
    """Return how far any singular value of a layer may have moved between two points of training, ().

    Each group has Weyl's bound b_g, and |σ_i' - σ_i| of the layer is at most sqrt(Σ_g b_g²), since both are norms.

    Args:
        P, Q, P_next, Q_next: Gramians before and after, in the same coordinates, (N, N) or (G, N, N) each.
    """
    return weyl_bound(P, Q, P_next, Q_next).square().sum().sqrt()
