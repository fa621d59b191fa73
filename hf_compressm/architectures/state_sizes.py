"""What a model says of its own state sizes: the mixers' attributes, the config, and the class that goes with it.

A Mamba is a plain `MambaForCausalLM`, which every tool loads, while all its layers have one size, and a
`CompreSSMMambaForCausalLM` otherwise. It changes its class in place, so that engines and optimizers keep their model.
"""

from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MambaModel
from transformers.models.mamba.modeling_mamba import MambaBlock

from ..engines import change_class, original_class
from .family import LAYOUTS, SelectiveLayout, StateLayout, layout_of, mixers_of, projection_module
from .per_layer import CompreSSMMambaConfig, CompreSSMMambaForCausalLM, CompreSSMMambaModel

PER_LAYER_CLASSES = {MambaForCausalLM: CompreSSMMambaForCausalLM, MambaModel: CompreSSMMambaModel}
MAX_LAYERS = 100_000  # more are no model's, but fill the memory with a list of them
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


def recorded_state_sizes(config: dict) -> dict[int, int]:
    """The function reads N from the content of a `config.json`, by layer index, of the layers that have a state.

    Raises:
        ValueError: the config says nothing, or nothing sensible, of the sizes.
    """
    layout, layers = LAYOUTS[config["model_type"]], layers_with_state(config)
    size = config.get(layout.size_field)
    given = size if isinstance(size, list) else [size] * len(layers)
    if len(given) != len(layers):
        raise ValueError(f"it gives {len(layers)} layers the state sizes {given}")
    sizes = dict(zip(layers, given, strict=True)) | _differing_sizes(config, layout, layers)
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        raise ValueError(f"it gives {len(layers)} layers the state sizes {list(sizes.values())}")
    return sizes


def layers_with_state(config: dict) -> list[int]:
    """The function reads the indices of the layers that have a state from the content of a `config.json`, ascending.

    In the families of today these are all layers. In a hybrid, where layers of attention lie between, they are not.

    Raises:
        ValueError: `num_hidden_layers` is no number of layers.
    """
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 <= layers <= MAX_LAYERS:
        raise ValueError(f"num_hidden_layers = {layers!r}; allowed: a whole number up to {MAX_LAYERS:,}")
    return list(range(layers))


def _differing_sizes(config: dict, layout: StateLayout, layers: list[int]) -> dict[int, object]:
    """The function returns N as `per_layer_config` gives it, by index, of those of `layers` that it speaks of."""
    given = config.get("per_layer_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"per_layer_config = {given!r}; allowed: a table of layers")
    widest = len(str(config["num_hidden_layers"] - 1))  # Transformers pads the numbers with zeros, so that they sort
    indices = {str(index).zfill(width): index for index in layers for width in range(1, widest + 1)}
    for index, differing in given.items():
        if index not in indices:
            raise ValueError(f"per_layer_config names a layer {index!r}; allowed: {_indices_text(layers)}")
        if not isinstance(differing, dict) or set(differing) != {layout.size_field}:
            raise ValueError(f"per_layer_config gives layer {index} {differing!r}; allowed: {layout.size_field} only")
    sizes = {indices[index]: differing[layout.size_field] for index, differing in given.items()}
    if len(sizes) < len(given):
        raise ValueError(f"per_layer_config names a layer twice: {', '.join(given)}")
    return sizes


def _indices_text(indices: list[int]) -> str:
    """The function returns all of them, or where none is left out the first and the last."""
    is_whole = indices == list(range(len(indices))) and len(indices) > 1
    return f"0 … {indices[-1]}" if is_whole else ", ".join(map(str, indices)) or "none"


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
