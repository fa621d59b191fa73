"""Time-invariant models: Hankel singular values from the weights alone, and balanced truncation."""

import torch
from torch import Tensor, nn

from ..architectures.family import layout_of, state_layers, state_size
from ..config import CompreSSMConfig
from ..engines import gathered_parameters
from ..theory.criteria import choose_states, seeded_generator
from ..theory.hankel import balancing_transformation, diagonal_gramians, diagonalize, project
from ..theory.plan import Plan, Projection, Selection
from .losses import parameter_names


class TimeInvariantAnalysis:
    """The balanced form of every layer; a plan keeps some of the balanced states and makes the result diagonal again.

    Without data, and exact for the complex system (λ, γB, C), whose σ these are. The layer gives the real part of that
    system's output, so the error bound holds for it too. Asked for more states than can be told from round-off, a
    layer gets idle ones in their place.

    Attributes:
        criterion: "hankel".
        compensate: False; balanced truncation has nothing to make up for.
        tokens: 0.
        scores: layer → Hankel singular values, (N,), descending: the scores of the balanced states.
    """

    criterion, compensate, tokens = "hankel", False, 0

    def __init__(self, model: nn.Module, config: CompreSSMConfig):
        self.model, self.config = model, config
        self.systems = {}
        for index, mixer in state_layers(model).items():
            with gathered_parameters(mixer):
                self.systems[index] = mixer.system()
        self._gramians = {index: diagonal_gramians(*system) for index, system in self.systems.items()}
        self._balancing = {index: balancing_transformation(*gramians) for index, gramians in self._gramians.items()}
        self.scores = {index: balancing.sigma for index, balancing in self._balancing.items()}

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Layer → σ, (N,), descending."""
        return self.scores

    def gramians(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer → (P, Q), (N, N) each."""
        return self._gramians

    def plan(self, sizes: dict[int, int]) -> Plan:
        """What becomes of each layer at these sizes; a layer that keeps its size stays as it is.

        Raises:
            ValueError: a truncated layer has no diagonal form that floating point could hold.
        """
        layers = state_layers(self.model)
        return {index: self._truncated(index, layers[index], size) for index, size in sizes.items()}

    def overrides(self, plan: Plan) -> dict[str, Tensor]:
        """Parameter name → value, for the layers that the plan cuts."""
        layers, names = state_layers(self.model), parameter_names(self.model)
        return {
            names[old]: entry.tensors[path].to(old.device, old.dtype)
            for index, entry in plan.items()
            if isinstance(entry, Projection)
            for path, old in ((path, layers[index].get_parameter(path)) for path in entry.tensors)
        }

    def _truncated(self, index: int, mixer: nn.Module, size: int) -> Selection | Projection:
        sigma, right, left, _ = self._balancing[index]
        if size == state_size(mixer, layout_of(self.model)):
            return Selection(torch.arange(size))
        generator = seeded_generator(self.config.calibration_seed, index)
        keep = choose_states(sigma, size, self.config.selection, generator)
        eigenvalues, B, C = diagonalize(*project(*self.systems[index], left[keep], right[:, keep]))
        if not eigenvalues.abs().max() < 1:
            raise ValueError(f"layer {index}: cut to {size} states it would be unstable; nothing was changed.")
        return Projection(keep, mixer.parameters_of(eigenvalues, B, C))
