"""The family of FalconMamba serves models that normalise Δ, B and C without weights.

What makes up for a smaller norm is a gain of the scan's output, g for channel d. It goes into column d of `out_proj`,
and `D` is divided by it: W (silu(z) ⊙ (g y + D u)) = (W g) (silu(z) ⊙ (y + (D / g) u)). Both tensors keep their size.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...theory.selective import StateMaps
from ..family import Block, StateTensor
from .mamba1 import Mamba1Family
from .normalised_mamba import NormalisedMambaFamily


class FalconMambaFamily(NormalisedMambaFamily):
    """A FalconMamba (arXiv 2410.05355) is a Mamba with RMS norms over Δ, B and C, which have no weights."""

    model_types = ("falcon_mamba",)
    mixer_class = "FalconMambaMixer"
    tensors = Mamba1Family.tensors | {
        "D": StateTensor(axis=0, blocks=(Block("intermediate_size", per_state=0),)),
        "out_proj.weight": StateTensor(axis=1, blocks=(Block("intermediate_size", per_state=0),)),
    }
    epsilon = "eps"
    title = "FalconMamba"

    def maps(self, tensors: Mapping[str, Tensor], mixer: nn.Module, size: int | None = None) -> StateMaps:
        """Return the maps of a Mamba, and gains of one for all channels."""
        maps = super().maps(tensors, mixer, size)
        return replace(maps, gains=torch.ones_like(maps.A_log[:, 0]))

    def write_maps(self, maps: StateMaps, mixer: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Write maps into the tensors of a layer; gains go into `out_proj` and `D`."""
        super().write_maps(maps, mixer, tensors)
        tensors["out_proj.weight"] *= maps.gains
        tensors["D"] /= maps.gains


FALCON_MAMBA = FalconMambaFamily()
