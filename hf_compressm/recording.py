"""What a model says of its own state sizes: the mixers' attributes, the config, and the class that goes with it.

A Mamba is a plain `MambaForCausalLM`, which every tool loads, while all its layers have one size, and a
`CompreSSMMambaForCausalLM` otherwise. It changes its class in place, so that engines and optimizers keep their model.
"""

from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MambaModel
from transformers.models.mamba.modeling_mamba import MambaBlock

from .engines import change_class, original_class
from .layouts import LAYOUTS, SelectiveLayout, StateLayout, layout_of, mixers_of, projection_module
from .per_layer import CompreSSMMambaConfig, CompreSSMMambaForCausalLM, CompreSSMMambaModel

PER_LAYER_CLASSES = {MambaForCausalLM: CompreSSMMambaForCausalLM, MambaModel: CompreSSMMambaModel}
PLAIN_CLASSES = {per_layer: plain for plain, per_layer in PER_LAYER_CLASSES.items()}


def check_per_layer(model: nn.Module) -> None:
    """Refuse layers with sizes of their own in an unwrapped model that could not be saved with them.

    Raises:
        ValueError: a class of the user's own, derived from Mamba's.
    """
    own = original_class(model)
    if model.config.model_type == "mamba" and own not in PER_LAYER_CLASSES:
        raise ValueError(
            f"layers of a {own.__name__} would have state sizes of their own; allowed in a "
            f"{' or '.join(plain.__name__ for plain in PER_LAYER_CLASSES)} itself. Set allocation='uniform'."
        )


def record_state_sizes(model: nn.Module, sizes: dict[int, int]) -> None:
    """Make everything true again that an unwrapped model says of its sizes, after its tensors were resized.

    Args:
        sizes: N by layer index, for some or all layers.
    """
    layout = layout_of(model)
    mixers = mixers_of(model)
    for index, size in sizes.items():
        _record_in_mixer(mixers[index], layout, size)
    everywhere = [getattr(mixer, layout.size_attribute) for mixer in mixers.values()]
    if isinstance(layout, SelectiveLayout):
        _record_in_mamba(model, everywhere)
    else:
        setattr(model.config, layout.size_field, everywhere[0] if len(set(everywhere)) == 1 else everywhere)


def recorded_state_sizes(config: dict) -> list[int]:
    """N of each layer, from the content of a `config.json`.

    Raises:
        ValueError: it says nothing, or nothing sensible, of the sizes.
    """
    layout = LAYOUTS[config["model_type"]]
    try:
        layers, size = config["num_hidden_layers"], config[layout.size_field]
        sizes = list(size) if isinstance(size, list) else [size] * layers
        for index, differing in config.get("per_layer_config", {}).items():
            sizes[int(index)] = differing.get(layout.size_field, sizes[int(index)])
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"no state sizes can be read from it ({type(error).__name__}: {error})") from error
    if len(sizes) != layers or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"it gives {layers} layers the state sizes {sizes}")
    return sizes


def _record_in_mixer(mixer: nn.Module, layout: StateLayout, size: int) -> None:
    setattr(mixer, layout.size_attribute, size)
    if isinstance(layout, SelectiveLayout):
        projection = projection_module(mixer, layout)
        projection.out_features = projection.weight.shape[0]


def _record_in_mamba(model: nn.Module, sizes: list[int]) -> None:
    config, is_uniform = model.config, len(set(sizes)) == 1
    if original_class(model) in PER_LAYER_CLASSES | PLAIN_CLASSES:
        _change_classes(model, is_uniform)
    config.per_layer_config = None
    config.state_size = max(sizes)
    if not is_uniform and config.model_type != "mamba":
        config.per_layer_config = {index: {"state_size": size} for index, size in enumerate(sizes)}
    for block in (module for module in model.modules() if isinstance(module, MambaBlock)):
        block.config = block.mixer.config = config.per_layer_config[block.layer_idx]


def _change_classes(model: nn.Module, is_uniform: bool) -> None:
    classes = PLAIN_CLASSES if is_uniform else PER_LAYER_CLASSES
    for module in model.modules():
        if original_class(module) in classes:
            change_class(module, classes[original_class(module)])
    model.config.__class__ = MambaConfig if is_uniform else CompreSSMMambaConfig
    vars(model.config).pop("auto_map", None)
