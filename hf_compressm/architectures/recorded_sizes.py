"""What a model and its `config.json` say of the state sizes of their layers."""

from collections.abc import Mapping

from .family import Family
from .layers import StateLayers
from .registry import FAMILIES

MAX_LAYERS = 100_000  # more are no model's, but fill the memory with a list of them


def record_state_sizes(layers: StateLayers, sizes: Mapping[int, int]) -> None:
    """Make everything true again that a model says of its sizes, after its tensors were resized.

    Args:
        sizes: N by layer index, for some or all layers.
    """
    for index, size in sizes.items():
        layers.family.record_in_mixer(layers[index], size)
    layers.family.record_in_model(layers.model, layers.sizes)


def recorded_state_sizes(config: dict) -> dict[int, int]:
    """N by layer index, of the layers that have a state, from the content of a `config.json`.

    Raises:
        ValueError: it says nothing, or nothing sensible, of the sizes.
    """
    family = FAMILIES[config["model_type"]]
    count, size = config.get("num_hidden_layers"), config.get(family.size_field)
    if type(count) is not int or not 0 <= count <= MAX_LAYERS:
        raise ValueError(f"num_hidden_layers = {count!r}; allowed: a whole number up to {MAX_LAYERS:,}")
    layers = family.layers_of_config(config)
    given = size if isinstance(size, list) else [size] * len(layers)
    if len(given) != len(layers):
        raise ValueError(f"it gives {len(layers)} layers the state sizes {given}")
    sizes = dict(zip(layers, given, strict=True)) | _differing_sizes(config, family, count)
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        raise ValueError(f"it gives {len(layers)} layers the state sizes {list(sizes.values())}")
    return sizes


def _differing_sizes(config: dict, family: Family, layers: int) -> dict[int, object]:
    """Layer → N, of those that `per_layer_config` speaks of, as it gives it."""
    given = config.get("per_layer_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"per_layer_config = {given!r}; allowed: a table of layers")
    widths = range(1, len(str(layers - 1)) + 1)  # Transformers pads the numbers with zeros, so that they sort
    positions = {str(index).zfill(width): index for index in range(layers) for width in widths}
    for index, differing in given.items():
        if index not in positions:
            raise ValueError(f"per_layer_config names a layer {index!r}; allowed: 0 … {layers - 1}")
        if not isinstance(differing, dict) or set(differing) != {family.size_field}:
            raise ValueError(f"per_layer_config gives layer {index} {differing!r}; allowed: {family.size_field} only")
    sizes = {positions[index]: differing[family.size_field] for index, differing in given.items()}
    if len(sizes) < len(given):
        raise ValueError(f"per_layer_config names a layer twice: {', '.join(given)}")
    return sizes
