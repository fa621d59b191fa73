"""The layers of a model that have a state are found and checked once, and handed down from there."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import is_pruned

from ..engines import full_tensor
from .registry import family_of


class StateLayers(Mapping[int, nn.Module]):
    """The mapping holds the mixers of an unwrapped model by layer index, with the model and its family.

    Layers without a state are absent, so that indices may have gaps. The mapping stays true through a resize: mixers
    stay the same modules, and sizes are read from them.

    Attributes:
        model: the unwrapped Transformers model.
        family: the family of its architecture.

    Raises:
        ValueError: the architecture is refused or unknown.
    """

    def __init__(self, model: nn.Module):
        self.model, self.family = model, family_of(model)
        self._mixers = self.family.mixers_in(model)
        names = {module: name for name, module in model.named_modules()}
        self._names = {index: names[mixer] for index, mixer in self._mixers.items()}

    def __getitem__(self, index: int) -> nn.Module:
        return self._mixers[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._mixers)

    def __len__(self) -> int:
        return len(self._mixers)

    @property
    def sizes(self) -> dict[int, int]:
        """Return N of each layer by layer index."""
        return {index: self.family.state_size(mixer) for index, mixer in self.items()}

    def place(self, index: int, path: str) -> tuple[nn.Module, str]:
        """Return the module that holds a parameter of a layer as its own, and its name there."""
        module_path, _, name = path.rpartition(".")
        return self[index].get_submodule(module_path), name

    def parameters(self, index: int) -> dict[str, nn.Parameter]:
        """Return the parameters of a layer that have a state axis, by their paths within the mixer."""
        return {path: self[index].get_parameter(path) for path in self.family.paths(self[index])}

    def whole_tensors(self, index: int) -> dict[str, Tensor]:
        """Return the same parameters as whole tensors; every process has to call this method."""
        return {path: full_tensor(parameter.detach()) for path, parameter in self.parameters(index).items()}

    def name(self, index: int) -> str:
        """Return the name that the mixer of a layer has in the whole model."""
        return self._names[index]

    def parameter_name(self, index: int, path: str) -> str:
        """Return the name that a parameter of a layer has in the whole model."""
        return f"{self._names[index]}.{path}"


def state_layers(model: nn.Module) -> StateLayers:
    """Find and check the layers of an unwrapped model that have a state.

    Raises:
        ValueError: the architecture is refused or unknown, no layer has a state, or a mixer's tensors are not as its
            family declares them, or are computed from other parameters.
    """
    layers = StateLayers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no {layers.family.mixer_class}: there is no state to resize.")
    for index, mixer in layers.items():
        for path in layers.family.paths(mixer):
            _check_is_parameter(layers, index, path)
        layers.family.check_mixer(mixer, index)
    return layers


def _check_is_parameter(layers: StateLayers, index: int, path: str) -> None:
    """Refuse a state tensor that is computed from other parameters, which a resize would have to cut in its place.

    Raises:
        ValueError: the tensor is parametrized, pruned or normalised.
    """
    module, name = layers.place(index, path)
    if name not in module._parameters and isinstance(getattr(module, name, None), Tensor):
        raise ValueError(
            f"layer {index}: {path} is no parameter but is computed from others, so it cannot be resized. Call "
            f"{_remedy(module, name)} on the {type_before_parametrizations(module).__name__} first."
        )


def _remedy(module: nn.Module, name: str) -> str:
    """Return the function of torch that makes a parameter again of a tensor that is computed from others."""
    if is_parametrized(module, name):
        return f"torch.nn.utils.parametrize.remove_parametrizations(…, '{name}')"
    if is_pruned(module):
        return f"torch.nn.utils.prune.remove(…, '{name}')"
    return f"torch.nn.utils.remove_weight_norm(…, '{name}') or remove_spectral_norm(…, '{name}')"


def state_sizes(model: nn.Module) -> dict[int, int]:
    """Return N of each layer of an unwrapped model that has a state, by layer index."""
    return state_layers(model).sizes
