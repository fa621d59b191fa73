"""The families whose mixers of Mamba-1 normalise B and C share what is here.

Each token's B and C are divided by their root mean squares over the states,

    b = w_B ⊙ B / √(mean B² + ε),   c = w_C ⊙ C / √(mean C² + ε),

so what is left of a layer depends on what is dropped: zero rows would stay in the means. Losses are therefore measured
with the tensors of the cut layer itself, at its size. `theory.selective.norm_gains` says by what the kept entries are
multiplied so that they stay, on average, what they were.
"""

import math

import torch
from torch import Tensor, nn

from ...theory.plan import Selection
from ...theory.selective import StateMaps
from ..family import Family
from ..tensors import cut_tensors
from .mamba1 import Mamba1Family


class NormalisedMambaFamily(Mamba1Family):
    """In a mixer of this family RMS norms over the states, `b_layernorm` and `c_layernorm`, follow B and C.

    Attributes:
        epsilon: the attribute of the norms that holds ε.
    """

    epsilon: str

    def masked(self, mixer: nn.Module, entry: Selection) -> dict[str, Tensor | int]:
        """Return the tensors of the cut layer and its N, at which the uncut layer computes with them."""
        return cut_tensors(self, mixer, entry)

    def pad(self, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Scale B and C, whose means are now over more states."""
        size = new[self.decay].shape[1]
        gain = math.sqrt(self.state_size(mixer) / size)
        self.write_maps(self.maps(new, mixer, size).scaled(gain, gain), mixer, new)

    def initialise(self, mixer: nn.Module, new: dict[str, Tensor], size: int, generator) -> None:
        """Refuse to grow: a row of B that is not zero changes the mean square of all.

        Raises:
            ValueError: always.
        """
        Family.initialise(self, mixer, new, size, generator)

    def input_and_output_maps(self, mixer: nn.Module, maps: StateMaps, u: Tensor) -> list[Tensor]:
        """Return B and C, (batch, N, L) each, normalised and multiplied by their weights."""
        found = []
        pairs = zip(super().input_and_output_maps(mixer, maps, u), maps.norm_weights, strict=True)
        for norm, (values, weights) in zip((mixer.b_layernorm, mixer.c_layernorm), pairs, strict=True):
            mean_square = values.square().mean(1, keepdim=True)
            found.append(values * torch.rsqrt(mean_square + getattr(norm, self.epsilon)) * weights.unsqueeze(1))
        return found

    def size_at(self, mixer: nn.Module, path: str, length: int) -> int:
        """Return the N at which a tensor has this length; the mixer's own where its length does not depend on N."""
        has_states = any(block.per_state for block in self.tensors[path].blocks)
        return super().size_at(mixer, path, length) if has_states else self.state_size(mixer)
