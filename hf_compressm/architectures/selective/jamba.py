"""The family of Jamba serves hybrids: some layers are Mambas that normalise Δ, B and C, others are attention.

The norms have weights, which take what makes up for a smaller norm, so that all that a cut changes has a state axis.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from transformers import JambaConfig

from ...theory.selective import StateMaps
from ..family import StateTensor
from .mamba1 import Mamba1Family
from .normalised_mamba import NormalisedMambaFamily


class JambaFamily(NormalisedMambaFamily):
    """A Jamba (arXiv 2403.19887) has Mambas with RMS norms over Δ, B and C, attention, and mixtures of experts."""

    model_types = ("jamba",)
    mixer_class = "JambaMambaMixer"
    size_field = "mamba_d_state"
    convolution_field = "mamba_d_conv"
    tensors = Mamba1Family.tensors | {
        "b_layernorm.weight": StateTensor(axis=0),
        "c_layernorm.weight": StateTensor(axis=0),
    }
    epsilon = "variance_epsilon"
    title = "Jamba"

    def maps(self, tensors: Mapping[str, Tensor], mixer: nn.Module, size: int | None = None) -> StateMaps:
        """Return the maps of a Mamba and the weights of the norms over B and C, as views."""
        maps, weights = super().maps(tensors, mixer, size), ("b_layernorm.weight", "c_layernorm.weight")
        B_weights, C_weights = (tensors[path] for path in weights)
        return replace(maps, B_weights=B_weights, C_weights=C_weights)

    def layers_of_config(self, config: Mapping) -> list[int]:
        """Return the indices of the layers that are Mambas.

        Raises:
            ValueError: a number that says which layers are attention is missing or impossible.
        """
        period, offset = (
            config.get(name, getattr(JambaConfig, name)) for name in ("attn_layer_period", "attn_layer_offset")
        )
        if not all(type(number) is int and number >= 0 for number in (period, offset)) or period == 0:
            raise ValueError(f"attn_layer_period = {period!r}, attn_layer_offset = {offset!r}; allowed: whole numbers")
        return [index for index in range(config["num_hidden_layers"]) if index % period != offset]

    def values_per_state(self, config: Mapping) -> int:
        """Return the number of channels: each has one number for each state."""
        return int(config["mamba_expand"] * config["hidden_size"])


JAMBA = JambaFamily()
