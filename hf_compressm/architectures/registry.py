"""The registry lists every architecture that the library serves."""

from torch import nn

from .family import Family
from .scalar_decay.mamba2 import AXIS_FAMILIES, BALANCED_FAMILIES
from .selective.falcon_mamba import FALCON_MAMBA
from .selective.jamba import JAMBA
from .selective.mamba import MAMBA
from .selective.zamba import ZAMBA
from .time_invariant.lru.family import LRU

FAMILIES: dict[str, Family] = {}  # by model type


def register(family: Family) -> None:
    """Let the library serve the models of a family, in the place of any that has the same model types."""
    FAMILIES.update(dict.fromkeys(family.model_types, family))


def family_of(model: nn.Module) -> Family:
    """Return the family of an unwrapped Transformers model.

    Raises:
        ValueError: the architecture is unknown; the message lists those that are served.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ValueError(
        f"cannot resize the state of model type '{model_type}': it is not known to have one. Supported: "
        f"{', '.join(FAMILIES)}."
    )


for served in (MAMBA, FALCON_MAMBA, JAMBA, ZAMBA, *AXIS_FAMILIES, *BALANCED_FAMILIES, LRU):
    register(served)
