"""What the library knows of each architecture: a file for each, which declares its family."""

from .layers import StateLayers, state_layers, state_sizes
from .registry import family_of, register

__all__ = ["StateLayers", "family_of", "register", "state_layers", "state_sizes"]
