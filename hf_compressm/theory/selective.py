"""This file measures on data what the states of a selective (time-varying) state space do.

    h_t[d, n] = exp(Δ_t[d] A[d, n]) h_{t-1}[d, n] + Δ_t[d] u_t[d] B_t[n]
    y_t[d]    = Σ_n C_t[n] h_t[d, n],   then gated by silu(z_t[d]) and mixed by out_proj

B_t and C_t are shared by all D channels, A is not, so no dense balancing transform can be written back into the
weights. Two things can be: a shared coordinate n can be dropped, and the rows that make C can be mapped linearly. This
file gives the sums that decide which coordinates to drop (`Statistics`), the surrogate Gramians built from them, and
the map that makes up for what was dropped (`compensation`). It holds mathematics only; sums accumulate in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .hankel import hankel_singular_values

SAMPLED_CHANNELS = 16
RIDGE = 1e-4  # of the mean diagonal of Π_KK, so that near-collinear states leave the solve well posed

Surrogate = Literal["mean", "second_moment"]
T = TypeVar("T")


@dataclass
class Statistics:
    """Statistics are running sums over calibration tokens of one layer; those of parts of the data add up.

    Below, w_d is ‖out_proj[:, d]‖², g is silu(z), and x is 1 - exp(Δ A), which keeps slow decays exact.
    """

    tokens: Tensor  # ()       number of tokens
    output_energy: Tensor  # (N,)     Σ_d w_d g_d² (C_n h_dn)²
    product_energy: Tensor  # (N,)     Σ_d (C_n h_dn)²
    gated_covariance: Tensor  # (N, N)   Σ_d w_d g_d² h_dn h_dm = Π
    decay: Tensor  # (D, N)   x_dn
    decay_square: Tensor  # (D, N)   x_dn²
    input_map: Tensor  # (D, N)   Δ_d B_n
    input_square: Tensor  # (D, N)   (Δ_d u_d)² B_n²
    output_map: Tensor  # (N,)     C_n
    output_square: Tensor  # (D, N)   w_d g_d² C_n²
    sampled_decay: Tensor  # (S, N, N) x_dn x_dm of the sampled channels
    sampled_input: Tensor  # (S, N, N) (Δ_d u_d)² B_n B_m
    sampled_output: Tensor  # (S, N, N) w_d g_d² C_n C_m

    @classmethod
    def empty(cls, channels: int, state_size: int, device: torch.device | str = "cpu") -> "Statistics":
        """Return sums over nothing, for D channels and N states."""
        D, N, S = channels, state_size, len(sampled_channels(channels))
        shapes = [(), (N,), (N,), (N, N), *[(D, N)] * 4, (N,), (D, N), *[(S, N, N)] * 3]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @property
    def samples(self) -> Tensor:
        """Return the number of tokens at which states were sampled, which is all that there are."""
        return self.tokens

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the sums over both sets of tokens."""
        return Statistics(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def accumulate(
        self,
        u: Tensor,
        time_step: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        gate: Tensor | None,
        states: Tensor,
        channel_weight: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Add tokens: T positions of each sequence of a batch; any of them will do, in any order.

        Args:
            u, time_step: input and effective Δ, (batch, D, T).
            A: (D, N), negative.
            B, C: (batch, N, T).
            gate: z, (batch, D, T); None for an ungated output.
            states: h, (batch, T, N, D).
            channel_weight: w, (D,).
            mask: 1 for tokens that count, 0 for padding, (batch, T).
        """
        with torch.autocast(u.device.type, enabled=False):
            mask = torch.ones_like(u[:, 0]) if mask is None else mask.to(u.dtype)
            gain = (channel_weight.to(u.dtype)[:, None] * mask[:, None]).expand_as(u)  # w_d g_d², (batch, D, T)
            if gate is not None:
                gain = gain * F.silu(gate.to(u.dtype)).square()
            B, C = B * mask[:, None], C * mask[:, None]
            self.tokens += mask.sum()
            self._accumulate_maps(time_step, time_step * u, B, C, gain)
            for i in range(len(u)):  # a sequence at a time, to hold little at a time
                self._accumulate_decay(
                    torch.expm1(time_step[i].T.unsqueeze(-1) * A).neg_().mul_(mask[i, :, None, None])
                )
                self._accumulate_output(states[i], C[i].T, gain[i].T)

    def _accumulate_maps(self, time_step: Tensor, drive: Tensor, B: Tensor, C: Tensor, gain: Tensor) -> None:
        """Add the sums of the maps; time step, drive Δ u and gain are (batch, D, T), B and C (batch, N, T)."""
        sample = sampled_channels(drive.shape[1]).to(drive.device)
        self.input_map += torch.einsum("bdt,bnt->dn", time_step, B)
        self.input_square += torch.einsum("bdt,bnt->dn", drive.square(), B.square())
        self.output_map += C.sum((0, 2))
        self.output_square += torch.einsum("bdt,bnt->dn", gain, C.square())
        self.sampled_input += _outer_sums(drive[:, sample].square(), B)
        self.sampled_output += _outer_sums(gain[:, sample], C)

    def _accumulate_decay(self, decay: Tensor) -> None:
        """Add the sums of the decay x, (T, D, N)."""
        sample = sampled_channels(decay.shape[1]).to(decay.device)
        sampled = decay[:, sample].transpose(0, 1).double()  # (S, T, N)
        self.sampled_decay += sampled.mT @ sampled
        total = decay.sum(0).double()
        total[sample] = sampled.sum(1)
        self.decay += total
        self.decay_square += decay.square_().sum(0)

    def _accumulate_output(self, h: Tensor, C: Tensor, gain: Tensor) -> None:
        """Add the sums of the output; the states h are (T, N, D), C (T, N), the gain (T, D)."""
        gated = h * gain.sqrt().unsqueeze(1)
        by_state = gated.transpose(0, 1).flatten(1)  # (N, T·D)
        self.gated_covariance += by_state @ by_state.T
        for energy, states in ((self.output_energy, gated), (self.product_energy, h)):
            # The norm over channels comes first, in one pass that only reads: C is the same for all of them.
            energy += (torch.linalg.vector_norm(states, dim=2) * C).double().square().sum(0)


@dataclass(frozen=True)
class StateMaps:
    """The states of a layer are made by rows of its projection for B and for C, and by their decay rates.

    Where a layer divides B and C by their root mean squares over the states (RMS norms), it has weights of these
    norms, or a gain for each channel. Then the scale of the rows says nothing, and it is these that scale the output.

    Attributes:
        B_rows, C_rows: (N, D) each.
        A_log: log(-A), (D, N).
        B_weights, C_weights: what the normalised B and C are multiplied by, (N,) each, or None.
        gains: what the scan's output is multiplied by, without the skip connection, (D,), or None.
    """

    B_rows: Tensor
    C_rows: Tensor
    A_log: Tensor
    B_weights: Tensor | None = None
    C_weights: Tensor | None = None
    gains: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return (value for value in vars(self).values() if value is not None)

    @property
    def norm_weights(self) -> tuple[Tensor, Tensor] | None:
        """Return the weights of the norms over B and C, ones where these have none, (N,) each; None without norms."""
        if self.C_weights is not None:
            return self.B_weights, self.C_weights
        return None if self.gains is None else (torch.ones_like(self.A_log[0]),) * 2

    def map(self, function: Callable[..., Tensor], *others: "StateMaps") -> "StateMaps":
        """Return maps with what a function makes of each map, and of those of `others` of the same name."""
        maps = (self, *others)
        values = {name: [vars(each)[name] for each in maps] for name, own in vars(self).items() if own is not None}
        return StateMaps(**{name: function(*each) for name, each in values.items()})

    def kept(self, keep: Tensor) -> "StateMaps":
        """Return the maps of the states `keep`, (r,)."""
        B_weights, C_weights = (None if each is None else each[keep] for each in (self.B_weights, self.C_weights))
        return StateMaps(self.B_rows[keep], self.C_rows[keep], self.A_log[:, keep], B_weights, C_weights, self.gains)

    def scaled(self, B_gain: Tensor | float, C_gain: Tensor | float) -> "StateMaps":
        """Return maps of a layer with norms that make B and C larger by these factors.

        The rows become smaller by them, so that ε, which the norms add to the mean square, counts as it did before.
        """
        maps = replace(self, B_rows=self.B_rows / B_gain, C_rows=self.C_rows / C_gain)
        if self.gains is not None:
            return replace(maps, gains=self.gains * (B_gain * C_gain))
        return replace(maps, B_weights=self.B_weights * B_gain, C_weights=self.C_weights * C_gain)


def heads_of(part: T | tuple[T, ...]) -> tuple[T, ...]:
    """Return what belongs to each head of a layer: a tuple with one entry a head, or what belongs to a single one."""
    return part if isinstance(part, tuple) else (part,)


@dataclass(frozen=True)
class LayerInputs:
    """Layer inputs are what the scan of a layer is given.

    Attributes:
        u, time_step: input and effective Δ, (batch, D, L).
        gate: z, (batch, D, L), or None.
        mask: 1 for tokens that count, 0 for padding, (batch, L), or None.
    """

    u: Tensor
    time_step: Tensor
    gate: Tensor | None
    mask: Tensor | None


def sampled_channels(channels: int) -> Tensor:
    """Return the channels whose full Gramians are kept: evenly spread, at most `SAMPLED_CHANNELS`."""
    return torch.linspace(0, channels - 1, min(channels, SAMPLED_CHANNELS)).round().long()


def gramian_diagonals(statistics: Statistics, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """Return the diagonals of every channel's surrogate Gramians (P, Q), float64, (D, N) each.

    The surrogates are those of `sampled_gramians`.
    """
    mean = _means(statistics)
    if surrogate == "mean":
        loss = _one_minus_product(mean.decay, mean.decay, mean.decay.square())
        return mean.input_map.square() / loss, mean.output_map.square() / loss
    loss = _one_minus_product(mean.decay, mean.decay, mean.decay_square)
    return mean.input_square / loss, mean.output_square / loss


def sampled_gramians(statistics: Statistics, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """Return the surrogate Gramians (P, Q) of the sampled channels, float64, (S, N, N) each.

    `mean` freezes the system at ā = E[exp(Δ A)], b̄ = E[Δ B], c̄ = E[C] (arXiv 2510.02823), so its Gramians are those of
    a time-invariant system. `second_moment` takes inputs as white in time and solves the mean-square Lyapunov
    equations P = E[Ā P Ā] + E[B̄ B̄ᵀ], Q = E[Ā Q Ā] + E[C̄ᵀ C̄] in their central form, entry by entry.
    """
    mean = _means(statistics)
    decay = mean.decay[sampled_channels(mean.decay.shape[0])]
    rows, columns = decay.unsqueeze(-1), decay.unsqueeze(-2)
    if surrogate == "mean":
        loss = _one_minus_product(rows, columns, rows * columns)
        inputs = mean.input_map[sampled_channels(mean.input_map.shape[0])]
        P = inputs.unsqueeze(-1) * inputs.unsqueeze(-2) / loss
        return P, torch.outer(mean.output_map, mean.output_map) / loss
    loss = _one_minus_product(rows, columns, mean.sampled_decay)
    return mean.sampled_input / loss, mean.sampled_output / loss


def layer_hankel_singular_values(statistics: Statistics, surrogate: Surrogate) -> Tensor:
    """Return the layer's spectrum, (N,), descending: σ of the surrogate, averaged over the sampled channels."""
    P, Q = sampled_gramians(statistics, surrogate)
    return hankel_singular_values(P, Q).mean(0)


def compensation(gated_covariance: Tensor, keep: Tensor) -> Tensor:
    """Return the map G that predicts dropped states from kept ones, h_R ≈ G h_K, by least squares on the data.

    It is G = Π_RK (Π_KK + λ I)⁻¹, so that y = C_K h_K + C_R h_R ≈ (C_K + C_R G) h_K.

    Args:
        gated_covariance: Π, (N, N).
        keep: kept coordinates, sorted, (r,).

    Returns:
        G, float64, (N - r, r).
    """
    dropped = complement(keep, gated_covariance.shape[0])
    kept_block = well_posed(gated_covariance[keep][:, keep])
    return torch.linalg.solve(kept_block, gated_covariance[keep][:, dropped]).mT


def weighted_covariance(gated_covariance: Tensor, weights: Tensor) -> Tensor:
    """Return Π as the rows of C see it where a norm multiplies what they make by weights, (N,)."""
    weights = weights.to(gated_covariance)
    return gated_covariance * weights * weights.unsqueeze(1)


def norm_gains(
    statistics: Statistics, keep: Tensor, norm_weights: tuple[Tensor, Tensor], prediction: Tensor | None = None
) -> Tensor:
    """Return by what kept entries of B and of C have to be multiplied to stay what they were, float64, (2,).

    An RMS norm over N entries divides by √(Σ x² / N), one over the r kept ones by √(Σ_K x² / r). With the kept share
    s = E[Σ_K x²] / E[Σ x²] these differ by √(s N / r). B is weighted by the drive (Δ u)², C by the gate w silu(z)².

    Args:
        keep: kept coordinates, sorted, (r,).
        norm_weights: the weights of the norms over B and C, (N,) each.
        prediction: G of `compensation`, which adds Gᵀ C_R to the kept entries C_K, (N - r, r), or None.
    """
    B, C = (inverse_weights(weights.to(statistics.output_map)) for weights in norm_weights)
    B_energy = statistics.input_square.sum(0) * B.square()
    C_products = weighted_covariance(statistics.sampled_output.sum(0), C)
    mixed = torch.eye(len(C)).to(C_products)[keep]
    if prediction is not None:
        mixed[:, complement(keep, len(C))] = prediction.to(mixed).mT
    shares = B_energy[keep].sum() / B_energy.sum(), ((mixed @ C_products) * mixed).sum() / C_products.trace()
    return (torch.stack(shares) * len(C) / len(keep)).sqrt()


def inverse_weights(weights: Tensor) -> Tensor:
    """Return the inverses of weights, or zero where a weight is zero, since nothing is known behind it."""
    return torch.where(weights == 0, 0, 1 / weights)


def well_posed(covariance: Tensor) -> Tensor:
    """Return the covariance, (r, r), with a small ridge, so that it is invertible where states are near-collinear."""
    ridge = RIDGE * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
    return covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def unexplained_shares(gated_covariance: Tensor, keep: Tensor) -> Tensor:
    """Return the share of each dropped state's gated variance that kept ones do not predict, in [0, 1], (N - r,).

    The rest, G Π_KR over Π_RR on the diagonal, is what `compensation` makes up for.
    """
    dropped = complement(keep, gated_covariance.shape[0])
    predicted = (compensation(gated_covariance, keep) * gated_covariance[dropped][:, keep]).sum(1)
    variance = gated_covariance.diagonal()[dropped].clamp_min(torch.finfo(torch.float64).tiny)
    return (1 - predicted / variance).clamp(0, 1)


def complement(keep: Tensor, state_size: int) -> Tensor:
    """Return the coordinates of 0 … N-1 that are not in `keep`, sorted."""
    dropped = torch.ones(state_size, dtype=torch.bool, device=keep.device)
    dropped[keep] = False
    return dropped.nonzero().squeeze(1)


def _means(statistics: Statistics) -> Statistics:
    return Statistics(*(getattr(statistics, field.name) / statistics.tokens for field in fields(statistics)))


def _one_minus_product(x: Tensor, y: Tensor, product: Tensor) -> Tensor:
    """Return 1 - E[(1 - x)(1 - y)] = E[x] + E[y] - E[x y], without the cancellation of the left-hand side."""
    return x + y - product


def _outer_sums(weight: Tensor, vectors: Tensor) -> Tensor:
    """Return Σ_{b,l} weight[b, s, l] v[b, n, l] v[b, m, l], (S, N, N).

    The products are taken in float64: in float32 they make a matrix that is indefinite by more than round-off.
    """
    weight, vectors = weight.double().transpose(0, 1).flatten(1), vectors.double().transpose(0, 1).flatten(1)
    return torch.stack([(vectors * channel) @ vectors.T for channel in weight])
