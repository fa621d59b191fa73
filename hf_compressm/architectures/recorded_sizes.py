"""A model and its `config.json` state the size of each layer; these functions write and read what they state."""

from collections.abc import Mapping

from .family import Family
from .layers import StateLayers
from .registry import FAMILIES

MAX_LAYERS = 100_000  # no model has more; a damaged number would fill the memory with a list of layers


def record_state_sizes(layers: StateLayers, sizes: Mapping[int, int]) -> None:
    """Update everything that a model states of its sizes, after its tensors were resized.

    Args:
        sizes: N by layer index, for some or all layers.
    """
    for index, size in sizes.items():
        layers.family.record_in_mixer(layers[index], size)
    layers.family.record_in_model(layers.model, layers.sizes)


def recorded_state_sizes(config: dict) -> dict[int, int]:
    """Return N of each layer that has a state, by layer index, from the content of a `config.json`.

    Raises:
        ValueError: the config does not state the sizes, or states impossible ones.
    """
    family = FAMILIES[config["model_type"]]
    count, size = family.layer_count_of_config(config), family.size_of_config(config)
    if type(count) is not int or not 0 <= count <= MAX_LAYERS:
        raise ValueError(f"num_hidden_layers = {count!r}; allowed: a whole number up to {MAX_LAYERS:,}")
    layers = family.layers_of_config(config)
    given = size if isinstance(size, list) else [size] * len(layers)
    if len(given) != len(layers):
        raise ValueError(f"it gives {len(layers)} layers the state sizes {given}")
    sizes = dict(zip(layers, given, strict=True)) | _differing_sizes(config, family, layers, count)
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        raise ValueError(f"it gives {len(layers)} layers the state sizes {list(sizes.values())}")
    return sizes


def _differing_sizes(config: dict, family: Family, layers: list[int], count: int) -> dict[int, object]:
    """Return N by layer index as `per_layer_config` gives it, of those of `layers`, out of `count`, that it names."""
    given = config.get("per_layer_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"per_layer_config = {given!r}; allowed: a table of layers")
    widest = len(str(count - 1))  # Transformers pads the numbers with zeros, so that they sort
    indices = {str(index).zfill(width): index for index in layers for width in range(1, widest + 1)}
    for index, differing in given.items():
        if index not in indices:
            raise ValueError(f"per_layer_config names a layer {index!r}; allowed: {_indices_text(layers)}")
        if not isinstance(differing, dict) or set(differing) != {family.size_field}:
            raise ValueError(f"per_layer_config gives layer {index} {differing!r}; allowed: {family.size_field} only")
    sizes = {indices[index]: differing[family.size_field] for index, differing in given.items()}
    if len(sizes) < len(given):
        raise ValueError(f"per_layer_config names a layer twice: {', '.join(given)}")
    return sizes


def _indices_text(indices: list[int]) -> str:
    """Return a text that names all indices, or only the first and the last where none between them is left out."""
    is_whole = indices == list(range(len(indices))) and len(indices) > 1
    return f"0 … {indices[-1]}" if is_whole else ", ".join(map(str, indices)) or "none"
