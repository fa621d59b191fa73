"""Masked parameters make a model compute as a plan would leave it, at its full size and without touching it."""

from torch import Tensor

from ..architectures import StateLayers
from ..theory.plan import Plan


def masked_parameters(layers: StateLayers, plan: Plan) -> dict[str, Tensor | int]:
    """Return parameter name → value, with which the layers that the plan cuts compute what they will after it.

    Where a value has the size of the cut layer, the attribute of the mixer that holds N is among the names.
    """
    return {
        layers.parameter_name(index, path): value
        for index in cut_layers(layers, plan)
        for path, value in layers.family.masked(layers[index], plan[index]).items()
    }


def cut_layers(layers: StateLayers, plan: Plan) -> list[int]:
    """Return the indices of the layers that the plan takes states from."""
    return [index for index, size in layers.sizes.items() if index in plan and plan[index].size < size]
