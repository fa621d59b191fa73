"""Models of some classes of this package are saved with the file of code that defines them."""

from .scalar_decay.balanced import modeling_compressm_balanced
from .selective.per_layer import modeling_compressm_mamba

_MODULES = (modeling_compressm_mamba, modeling_compressm_balanced)
CODE_FILES = tuple(f"{module.MODULE}.py" for module in _MODULES)  # beside the weights


def needs_code(class_name: str) -> bool:
    """Return whether a model of this class needs a file of code beside its weights, where this package is missing."""
    defined_in = (getattr(getattr(module, class_name, None), "__module__", None) for module in _MODULES)
    return any(name == module.__name__ for name, module in zip(defined_in, _MODULES, strict=True))
