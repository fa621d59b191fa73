"""Time-invariant models are analysed from their weights alone and reduced by balanced truncation."""

import torch
from torch import Tensor

from ..architectures import StateLayers
from ..config import CompreSSMConfig
from ..engines import gathered_parameters
from ..theory.criteria import choose_states, seeded_generator
from ..theory.hankel import balancing_transformation, diagonal_gramians, diagonalize, project
from ..theory.plan import Plan, PlanEntry, Projection, Selection


class TimeInvariantAnalysis:
    """A time-invariant analysis balances every layer; its plans keep some balanced states and are diagonal again.

    It needs no data, and is exact for the complex system (λ, γB, C), whose σ these are. The layer gives the real part
    of that system's output, so the error bound holds for it too. A layer that is asked for more states than can be
    told from round-off gets idle ones in their place.

    Attributes:
        scores: layer → Hankel singular values, (N,), descending: the scores of the balanced states.
        gramians: layer → (P, Q), (N, N) each.
    """

    criterion, score_power, compensate, tokens, covariances = "hankel", 1, False, 0, None

    def __init__(self, layers: StateLayers, config: CompreSSMConfig):
        self.layers, self.config = layers, config
        self.systems = {}
        for index, mixer in layers.items():
            with gathered_parameters(mixer):
                self.systems[index] = layers.family.system(mixer)
        self.gramians = {index: diagonal_gramians(*system) for index, system in self.systems.items()}
        self._balancing = {index: balancing_transformation(*gramians) for index, gramians in self.gramians.items()}
        self.scores = {index: balancing.sigma for index, balancing in self._balancing.items()}

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Return layer → σ, (N,), descending."""
        return self.scores

    def plan(self, sizes: dict[int, int]) -> Plan:
        """Return what becomes of each layer at these sizes; a layer that keeps its size stays as it is.

        Raises:
            ValueError: a truncated layer has no diagonal form that floating point could hold.
        """
        return {index: self._truncate(index, size) for index, size in sizes.items()}

    def predicted_errors(self, plan: Plan) -> dict[int, float]:
        """Return an empty dict: singular values of systems with a memory bound the error, and are not it."""
        return {}

    def _truncate(self, index: int, size: int) -> PlanEntry:
        sigma, right, left, _ = self._balancing[index]
        if size == len(sigma):
            return Selection(torch.arange(size))
        generator = seeded_generator(self.config.calibration_seed, index)
        kept = choose_states(sigma, size, self.config.selection, generator)
        eigenvalues, B, C = diagonalize(*project(*self.systems[index], left[kept], right[:, kept]))
        if not eigenvalues.abs().max() < 1:
            raise ValueError(f"layer {index}: cut to {size} states it would be unstable; nothing was changed.")
        return Projection(kept, self.layers.family.tensors_of(self.layers[index], eigenvalues, B, C))
