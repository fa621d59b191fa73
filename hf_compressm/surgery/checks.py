"""What a resize could not do well is refused here, before anything is changed."""

import torch
from torch import Tensor, nn

from ..architectures import StateLayers
from ..architectures.family import Family
from ..engines import to_local
from .optimizer_parts import OptimizerParts


def check_state_tensors(layers: StateLayers, optimizer=None, is_overwritten: bool = False) -> None:
    """Refuse a model or an optimizer whose state could not be resized well.

    Args:
        optimizer: what trains the model, or None.
        is_overwritten: True where other contents are about to be loaded, so that those of now may be NaN.

    Raises:
        ValueError: layers share a mixer or a state tensor, a weight is not finite or is trained in float16 or
            bfloat16, or the optimizer cannot follow.
    """
    _check_mixers_are_distinct(layers)
    _check_nothing_is_shared(layers)
    parameters = state_parameters(layers)
    for name, parameter in parameters.items():
        if not is_overwritten and not torch.isfinite(to_local(parameter)).all():
            raise ValueError(f"{name} holds NaN or Inf: training has diverged; go back to an earlier checkpoint.")
        if optimizer is not None and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is trained in {parameter.dtype}, which ruins the decay spectrum. Keep the weights in float32 "
                "and train with autocast: TrainingArguments(bf16=True) and a model loaded with dtype=torch.float32."
            )
    if optimizer is not None:
        OptimizerParts(optimizer).check(parameters)


def state_parameters(layers: StateLayers) -> dict[str, nn.Parameter]:
    """Return the state tensors of all layers by the names that errors call them."""
    return {f"layer {index} {path}": one for index in layers for path, one in layers.parameters(index).items()}


def _check_mixers_are_distinct(layers: StateLayers) -> None:
    """Refuse a model with fewer layers than it seems to have, since a layer is known by its mixer and its index.

    Raises:
        ValueError: two mixers have one index, or a list of layers runs one mixer twice.
    """
    family = layers.family
    for name, module in layers.model.named_modules():
        if family.is_mixer(module) and layers[module.layer_idx] is not module:
            other = layers.name(module.layer_idx)
            raise ValueError(
                f"{name} and {other} both have layer_idx = {module.layer_idx}: give each layer an index of its own."
            )
        if isinstance(module, nn.ModuleList):
            first: dict[nn.Module, int] = {}
            for position, mixer in ((i, mixer) for i, entry in enumerate(module) for mixer in _mixers(family, entry)):
                if first.setdefault(mixer, position) != position:
                    raise ValueError(
                        f"{name}.{first[mixer]} and {name}.{position} run the same {family.mixer_class}, so states "
                        "cannot be resized by layer: give each layer a copy of its own, with its own layer_idx."
                    )


def _mixers(family: Family, module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if family.is_mixer(inner)]


def _check_nothing_is_shared(layers: StateLayers) -> None:
    """Refuse state tensors that are used elsewhere in the model too, where they would keep their old size.

    Raises:
        ValueError: a state tensor lies in the memory of another state tensor, parameter or buffer.
    """
    names, places = {}, set()
    for index in layers:
        for path, parameter in layers.parameters(index).items():
            name = layers.parameter_name(index, path)
            places.add(layers.place(index, path))
            _check_is_the_same(names.setdefault(_memory(parameter), name), name)
    for module_name, module in layers.model.named_modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        for own_name, tensor in (*parameters, *module.named_buffers(recurse=False)):
            if (module, own_name) not in places:
                name = f"{module_name}.{own_name}".lstrip(".")
                _check_is_the_same(names.get(_memory(tensor), name), name)


def _check_is_the_same(first: str, name: str) -> None:
    if first != name:
        raise ValueError(
            f"{first} and {name} are one tensor, so neither can be resized alone: give each a parameter of its own, "
            "such as nn.Parameter(tensor.detach().clone())."
        )


def _memory(tensor: Tensor) -> tuple | int:
    """Return where the values of a tensor lie; one without values, as a small shard may be, is known by itself."""
    part = to_local(tensor)
    return (part.device, part.data_ptr()) if part.numel() else id(tensor)
