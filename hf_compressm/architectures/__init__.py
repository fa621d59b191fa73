"""Each architecture has one file or folder here, which declares its family: all that the library knows of it."""

from .layers import StateLayers, state_layers, state_sizes
from .registry import family_of, register

__all__ = ["StateLayers", "family_of", "register", "state_layers", "state_sizes"]
