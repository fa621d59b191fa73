"""The family of Mamba-1 serves models with one state size for all layers, or with one for each.

While all its layers have one size, a Mamba is a plain `MambaForCausalLM`, which every tool loads; otherwise it is a
`CompreSSMMambaForCausalLM`. It changes its class in place, so that engines and optimizers keep their model.
"""

from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MambaModel
from transformers.models.mamba.modeling_mamba import MambaBlock

from ...engines import change_class, original_class
from .mamba1 import Mamba1Family
from .per_layer import CompreSSMMambaConfig, CompreSSMMambaForCausalLM, CompreSSMMambaModel

PER_LAYER_CLASSES = {MambaForCausalLM: CompreSSMMambaForCausalLM, MambaModel: CompreSSMMambaModel}
PLAIN_CLASSES = {per_layer: plain for plain, per_layer in PER_LAYER_CLASSES.items()}


class MambaFamily(Mamba1Family):
    """A Mamba (arXiv 2312.00752) may have a size for each layer, in a class of this package."""

    model_types = ("mamba", "compressm_mamba")
    mixer_class = "MambaMixer"
    title = "Mamba"

    def is_per_layer(self, model: nn.Module) -> bool:
        """Return True for a model whose layers differ already; any other stays one that every tool loads."""
        return isinstance(model.config, CompreSSMMambaConfig)

    def check_per_layer(self, model: nn.Module) -> None:
        """Refuse a class that the user derived from Mamba's, since it has no counterpart with a size for each layer.

        Raises:
            ValueError: the model is of such a class.
        """
        own = original_class(model)
        if not self.is_per_layer(model) and own not in PER_LAYER_CLASSES:
            raise ValueError(
                f"layers of a {own.__name__} would have state sizes of their own; allowed in a "
                f"{' or '.join(plain.__name__ for plain in PER_LAYER_CLASSES)} itself. Set allocation='uniform'."
            )

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Update the class and the config of a model, and give blocks and mixers the config of their own layer."""
        config, is_uniform = model.config, len(set(sizes.values())) == 1
        if original_class(model) in PER_LAYER_CLASSES | PLAIN_CLASSES:
            _change_classes(model, is_uniform)
        config.per_layer_config = None
        config.state_size = max(sizes.values())
        if not is_uniform and self.is_per_layer(model):
            config.per_layer_config = {index: {"state_size": size} for index, size in sizes.items()}
        for block in (module for module in model.modules() if isinstance(module, MambaBlock)):
            block.config = block.mixer.config = config.per_layer_config[block.layer_idx]


def _change_classes(model: nn.Module, is_uniform: bool) -> None:
    classes = PLAIN_CLASSES if is_uniform else PER_LAYER_CLASSES
    for module in model.modules():
        if original_class(module) in classes:
            change_class(module, classes[original_class(module)])
    model.config.__class__ = MambaConfig if is_uniform else CompreSSMMambaConfig
    for name in ("auto_map", "model_type"):  # a config that was loaded has a model_type of its own
        vars(model.config).pop(name, None)


MAMBA = MambaFamily()
