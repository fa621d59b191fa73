"""The registry lists every architecture that the library knows: those it serves, and those it refuses, with why."""

from torch import nn

from .falcon_mamba import FALCON_MAMBA
from .family import Family
from .jamba import JAMBA
from .lru.family import LRU
from .mamba import MAMBA
from .zamba import ZAMBA

FAMILIES: dict[str, Family] = {}  # by model type
UNSUPPORTED = {
    "mamba2": "its state is shared within heads and groups",
    **dict.fromkeys(
        ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"),
        "hybrids of attention and state space layers are not handled yet",
    ),
}


def register(family: Family) -> None:
    """Let the library serve the models of a family, in the place of any that has the same model types."""
    FAMILIES.update(dict.fromkeys(family.model_types, family))


def family_of(model: nn.Module) -> Family:
    """Return the family of an unwrapped Transformers model.

    Raises:
        ValueError: the architecture is refused or unknown; the message lists those that are served.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = UNSUPPORTED.get(model_type, "it is not known to have a state that can be resized")
    raise ValueError(
        f"cannot resize the state of model type '{model_type}': {reason}. Supported: {', '.join(FAMILIES)}."
    )


for served in (MAMBA, FALCON_MAMBA, JAMBA, ZAMBA, LRU):
    register(served)
