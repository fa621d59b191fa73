"""A family declares of one architecture where its states lie and what is true of them, and answers what is asked.

A family is one object of a class that has a file of its own; `registry.py` knows all of them. The mathematics lies in
`theory` and the scans lie in `kernels`: a family connects them with the modules of a Transformers model. The check
list for a new family is docs/adding-an-architecture.md.

A *mixer* is the module of a layer that owns the state, and N is the number of its states. A *path* is the name of a
parameter within the mixer, such as `x_proj.weight`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..theory.plan import PlanEntry, Projection


class Block(NamedTuple):
    """A block is a run of entries that lie side by side on the state axis of a tensor.

    Attributes:
        name: what the entries are, such as "B"; for a block with `per_state` 0, the attribute of the mixer that holds
            the block's length.
        per_state: the number of entries for each state: a number, which is 0 for entries that belong to no state, or
            the attribute of the mixer that holds the number (its groups). The entries of all states of one group lie
            side by side, and the groups follow each other.
    """

    name: str
    per_state: int | str = 1


class StateTensor(NamedTuple):
    """A state tensor is a parameter of the mixer that has a state axis.

    Attributes:
        axis: the state axis.
        blocks: the blocks along that axis, in order; by default, one entry for each state and nothing else.
        is_optional: True where some mixers of the family lack the parameter, such as a bias.
    """

    axis: int
    blocks: tuple[Block, ...] = (Block("state"),)
    is_optional: bool = False


class Family(ABC):
    """A family declares one architecture; this class holds what all families have in common.

    The library calls its methods with the modules of an unwrapped Transformers model. A parameter may be sharded over
    processes, so a method that needs all of one takes `full_tensor` of it.

    Attributes:
        model_types: the `config.model_type` of its models.
        mixer_class: the class name of the mixers; a mixer has its layer's index as `layer_idx`.
        size_attribute: the attribute of the mixer that holds N.
        size_field: the field of the config that holds N.
        tensors: path of each parameter that has a state axis → where the states lie in it.
        needs_data: True where states are ranked by what they do on data, False where by the weights alone.
        is_language_model: True where its models have a language modelling head, and so a model card.
        can_refit: True where kept states can be fitted to what the uncut layer did.
        can_allocate_globally: True where losses can tell which layer needs its states most.
        bases: the bases in which a layer can be cut, the default first: "axis" keeps some of its coordinates,
            "balanced" some of its balanced ones.
        criteria: the names of the scores by which its states can be ranked; none where the basis ranks them.
        title: what the card calls a model of the family.
        limits: what the card says of the limits of a reduction; only language models need it.
    """

    model_types: tuple[str, ...]
    mixer_class: str
    size_attribute: str
    size_field: str = "state_size"
    tensors: Mapping[str, StateTensor]
    needs_data: bool
    is_language_model: bool
    can_refit: bool = False
    can_allocate_globally: bool = False
    bases: tuple[str, ...] = ("axis",)
    criteria: Collection[str] = ()
    title: str
    limits: str

    # Questions about where states lie

    def mixers_in(self, model: nn.Module) -> dict[int, nn.Module]:
        """Return the mixers of a model by layer index, ascending, whatever sizes they have."""
        mixers = {module.layer_idx: module for module in model.modules() if self.is_mixer(module)}
        return dict(sorted(mixers.items()))

    def is_mixer(self, module: nn.Module) -> bool:
        """Return whether a module is a mixer, by its class, from which FSDP2 and a parametrization derive others."""
        return type_before_parametrizations(module).__name__ in (self.mixer_class, f"FSDP{self.mixer_class}")

    def paths(self, mixer: nn.Module) -> list[str]:
        """Return the paths of the state tensors that this mixer has."""
        return [path for path, tensor in self.tensors.items() if not tensor.is_optional or _has(mixer, path)]

    def state_size(self, mixer: nn.Module) -> int:
        """Return N of one layer."""
        return getattr(mixer, self.size_attribute)

    def scans(self, mixer: nn.Module) -> int:
        """Return how many scans a forward pass of a mixer runs: one, or one for each head that has its own B and C."""
        return 1

    def axis_length(self, mixer: nn.Module, path: str, size: int | None = None) -> int:
        """Return how many entries a tensor has on its state axis, at N = `size` or else at the mixer's own N."""
        return sum(self.block_length(mixer, block, size) for block in self.tensors[path].blocks)

    def size_at(self, mixer: nn.Module, path: str, length: int) -> int:
        """Return the N at which a tensor has `length` entries on its state axis: the inverse of `axis_length`.

        Raises:
            ValueError: there is no such N.
        """
        fixed = self.axis_length(mixer, path, 0)
        return whole_quotient(length - fixed, self.axis_length(mixer, path, 1) - fixed, path)

    def block_slice(self, mixer: nn.Module, path: str, name: str, size: int | None = None) -> slice:
        """Return where a block lies on the state axis of its tensor, at N = `size` or else at the mixer's own N.

        Raises:
            KeyError: the tensor has no block of this name.
        """
        start = 0
        for block in self.tensors[path].blocks:
            length = self.block_length(mixer, block, size)
            if block.name == name:
                return slice(start, start + length)
            start += length
        raise KeyError(name)

    def source_index(self, mixer: nn.Module, path: str, source: Tensor) -> Tensor:
        """Return the positions along a tensor's state axis that a resize takes its entries from.

        Args:
            source: for each of the N' states after the resize, the state that it comes from, or -1 where it is new:
                (N',) for all groups alike, or (groups, N').

        Returns:
            For each entry on the state axis after the resize, its position before, or -1 where its state is new, 1-D.
        """
        positions, start = [], 0
        for block in self.tensors[path].blocks:
            length, groups = self.block_length(mixer, block), self._entries_per_state(mixer, block)
            if groups:
                first = start + self.state_size(mixer) * torch.arange(groups, device=source.device).unsqueeze(1)
                positions.append(torch.where(source < 0, -1, first + source).flatten())
            else:
                positions.append(torch.arange(start, start + length, device=source.device))
            start += length
        return torch.cat(positions)

    def size_in_weights(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> int:
        """Return N of a layer of a checkpoint from the shapes of its state tensors, by path.

        There is no mixer to ask, so this method reads a tensor whose blocks all have a fixed number of entries for
        each state. A family without such a tensor, or with groups, has to override it.

        Args:
            config: the content of the checkpoint's `config.json`.

        Raises:
            ValueError: no N gives a tensor this shape.
        """
        path, tensor = next((p, t) for p, t in self.tensors.items() if all(block.per_state for block in t.blocks))
        return shapes[path][tensor.axis] // sum(block.per_state for block in tensor.blocks)

    def layer_count_of_config(self, config: Mapping) -> object:
        """Return what the content of a `config.json` gives for the number of layers, with those without a state."""
        return config.get("num_hidden_layers")

    def layers_of_config(self, config: Mapping) -> list[int]:
        """Return the indices of the layers that have a state, from the content of a `config.json`; here, of all."""
        return list(range(config["num_hidden_layers"]))

    def size_of_config(self, config: Mapping) -> object:
        """Return what the content of a `config.json` gives for N: a number, or a list with one for each layer."""
        return config.get(self.size_field)

    # Checks and records of a model's sizes

    def check_mixer(self, mixer: nn.Module, index: int) -> None:
        """Refuse a mixer whose tensors are not as the family declares them.

        Raises:
            ValueError: a tensor does not have the size that the mixer states.
        """
        for path in self.paths(mixer):
            given = mixer.get_parameter(path).shape[self.tensors[path].axis]
            expected = self.axis_length(mixer, path)
            if given != expected:
                raise ValueError(
                    f"layer {index}: {path} has {given} entries on its state axis, but state_size = "
                    f"{self.state_size(mixer)} asks for {expected}; the model's weights and config disagree."
                )

    @abstractmethod
    def is_per_layer(self, model: nn.Module) -> bool:
        """Return whether a reduction of this model gives each layer a size of its own, unless it is told otherwise."""

    def check_per_layer(self, model: nn.Module) -> None:
        """Refuse to give layers sizes of their own in a model that could not be saved with them.

        Raises:
            ValueError: the model knows one size for all layers. Here that holds for every model; a family whose models
                can do better overrides this method.
        """
        raise ValueError(
            f"layers of a {type(model).__name__} would have state sizes of their own; it knows one for all. Set "
            "allocation='uniform'."
        )

    def record_in_mixer(self, mixer: nn.Module, size: int) -> None:
        """Update what a mixer states of its size, after its tensors were resized to N = `size`."""
        setattr(mixer, self.size_attribute, size)

    @abstractmethod
    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Update what the config and the class of a model state of its sizes, after its mixers were updated.

        Args:
            sizes: N of every layer that has a state, by layer index.
        """

    # Changes of a layer's tensors

    @abstractmethod
    def reduce(self, entry: PlanEntry, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Finish, in place, the tensors of a layer after a cut; called only for layers that the plan changes.

        Args:
            entry: what the plan says of this layer.
            mixer: the mixer, still at its old size.
            old: the whole state tensors before the cut, by path.
            new: the same of the kept states alone, gathered from `old`; they become the layer's parameters.
        """

    @abstractmethod
    def masked(self, mixer: nn.Module, entry: PlanEntry) -> dict[str, Tensor | int]:
        """Return the tensors with which an uncut layer computes what it will compute after the cut.

        Losses are measured with these tensors in the place of the layer's own, before anything is changed. Every
        process has to call this method, since each may hold only a part of a tensor.

        Returns:
            The whole tensors by path; those that stay may be left out. They may be those of the cut layer; then a
            mixer that reads N gets it, too, by the name of its attribute.
        """

    def pad(self, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Finish, in place, the tensors `new` of a layer that gets states that do nothing, so that its output stays.

        Arguments are those of `reduce`; entries of new states are zero.

        Raises:
            ValueError: the layer cannot have so many; here, never.
        """
        return  # rows of zeros do nothing

    def initialise(self, mixer: nn.Module, new: dict[str, Tensor], size: int, generator) -> None:
        """Fill, in place, the entries of the states that are new in a layer that grows to `size` states.

        The new states must leave the output of the layer as it is, and be able to learn.

        Args:
            mixer: the mixer, still at its old size.
            new: the whole state tensors at the new size, by path; entries of new states are zero.
            size: N after the growth.
            generator: a `torch.Generator` for what is drawn, or None.

        Raises:
            ValueError: layers of this family cannot grow, as here.
        """
        raise ValueError(f"The states of a {self.title} cannot grow; use pad_state.")

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """Yield the parameters of a mixer that must not be decayed; here there are none."""
        return iter(())

    def slow_scan(self, device_type: str) -> str | None:
        """Return a warning for a user whose model, on "cpu" or "cuda", would train with a slow scan, or None."""
        return None

    # Numbers for the model card

    @abstractmethod
    def values_per_state(self, config: Mapping) -> int:
        """Return how many numbers a sequence carries for each state of a layer, by the content of a `config.json`."""

    def removed_parameters(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping, states: int) -> int:
        """Return how many parameters a layer has lost with so many states, below 0 where it has more.

        Args:
            shapes: those of its state tensors now, by path.
        """
        return states * self.parameters_per_state(shapes, config)

    def refit_values(self, config: Mapping, size: int) -> int:
        """Return how many numbers for each token a refit of a layer of N = `size` is given; 0: it has none."""
        return 0

    def convolution_values(self, config: Mapping, size: int) -> int:
        """Return how many past inputs of its convolution a layer of N = `size` keeps of a sequence; 0: not told."""
        return 0

    def count_of_config(self, config: Mapping, field: str) -> int:
        """Return a number from the content of a `config.json`.

        Raises:
            ValueError: it is no positive whole number, or missing.
        """
        value = config.get(field)
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json has {field} = {value!r}; allowed: a whole number from 1.")
        return value

    def parameters_per_state(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> int:
        """Return how many parameters each state of a layer has, from the shapes of its state tensors, by path.

        As in `size_in_weights`, there is no mixer to ask: a family with groups has to override this method.
        """
        return sum(
            sum(block.per_state for block in self.tensors[path].blocks)
            * math.prod(shape)
            // shape[self.tensors[path].axis]
            for path, shape in shapes.items()
        )

    def block_length(self, mixer: nn.Module, block: Block, size: int | None = None) -> int:
        """Return how many entries a block has, at N = `size` or else at the mixer's own N."""
        per_state = self._entries_per_state(mixer, block)
        if not per_state:
            return getattr(mixer, block.name)
        return per_state * (self.state_size(mixer) if size is None else size)

    def _entries_per_state(self, mixer: nn.Module, block: Block) -> int:
        return getattr(mixer, block.per_state) if isinstance(block.per_state, str) else block.per_state


class ProjectedFamily(Family):
    """A projected family has layers that a cut gives new tensors, in new coordinates of the state.

    So gradients and optimizer state of these tensors start afresh.
    """

    def reduce(self, entry: Projection, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Copy the tensors of the smaller layer into `new`."""
        for path in entry.tensors:
            new[path].copy_(entry.tensors[path])

    def masked(self, mixer: nn.Module, entry: Projection) -> dict[str, Tensor]:
        """Return the tensors of the smaller layer: a layer computes at the size of the tensors that it is given."""
        parameters = {path: mixer.get_parameter(path) for path in entry.tensors}
        return {path: entry.tensors[path].to(old.device, old.dtype) for path, old in parameters.items()}


def _has(mixer: nn.Module, path: str) -> bool:
    """Return whether a mixer has this parameter."""
    module_path, _, name = path.rpartition(".")
    return getattr(mixer.get_submodule(module_path), name, None) is not None


def whole_quotient(length: int, per_state: int, path: str) -> int:
    """Return N = length / per_state.

    Raises:
        ValueError: it is no whole number.
    """
    if length < 0 or length % per_state:
        raise ValueError(f"{path} has {length} entries for states, which come by {per_state}.")
    return length // per_state


def check_projections(mixer: nn.Module, index: int, name: str) -> None:
    """Refuse a mixer whose projection `name` is no plain linear layer, or whose `out_proj` is packed.

    Raises:
        ValueError: it is of another class, or the weight of `out_proj` is no parameter.
    """
    projection = getattr(mixer, name)
    is_plain = {
        name: type(projection) is nn.Linear or type(projection).__name__ == "FSDPLinear",
        "out_proj": isinstance(mixer.out_proj.weight, nn.Parameter),
    }
    for path, plain in is_plain.items():
        if not plain:
            given = type(getattr(mixer, path))
            raise ValueError(
                f"layer {index}: {path}.weight belongs to a {given.__module__}.{given.__qualname__}, expected a "
                "plain nn.Linear. Merge adapters first, and quantise after the cut."
            )
