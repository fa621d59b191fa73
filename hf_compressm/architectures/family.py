"""A family declares of one architecture where its states lie and what is true of them, and answers what is asked.

A family is one object of a class that has a file of its own; `registry.py` knows all of them. The mathematics lies in
`theory` and the scans lie in `kernels`: a family connects them with the modules of a Transformers model. The check
list for a new family is docs/adding-an-architecture.md.

A *mixer* is the module of a layer that owns the state, and N is the number of its states. A *path* is the name of a
parameter within the mixer, such as `x_proj.weight`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..engines import full_tensor
from ..theory.plan import PlanEntry, Projection, Selection
from ..theory.selective import LayerInputs, StateMaps, complement

# An observer runs a scan in the place of the model. It takes the scan's arguments by position, (u, time_step, A, B, C,
# D, gate, time_step_bias, softplus), where D, gate and time_step_bias may be None, and returns (y, last_state).
Observer = Callable[..., tuple[Tensor, Tensor]]


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
    """

    axis: int
    blocks: tuple[Block, ...] = (Block("state"),)


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

    def state_size(self, mixer: nn.Module) -> int:
        """Return N of one layer."""
        return getattr(mixer, self.size_attribute)

    def scans(self, mixer: nn.Module) -> int:
        """Return how many scans a forward pass of a mixer runs: one, or one for each head with its own B and C."""
        return 1

    def axis_length(self, mixer: nn.Module, path: str, size: int | None = None) -> int:
        """Return how many entries a tensor has on its state axis, at N = `size` or else at the mixer's own N."""
        return sum(self._block_length(mixer, block, size) for block in self.tensors[path].blocks)

    def size_at(self, mixer: nn.Module, path: str, length: int) -> int:
        """Return the N at which a tensor has `length` entries on its state axis: the inverse of `axis_length`."""
        fixed = self.axis_length(mixer, path, 0)
        return (length - fixed) // (self.axis_length(mixer, path, 1) - fixed)

    def block_slice(self, mixer: nn.Module, path: str, name: str, size: int | None = None) -> slice:
        """Return where a block lies on the state axis of its tensor, at N = `size` or else at the mixer's own N.

        Raises:
            KeyError: the tensor has no block of this name.
        """
        start = 0
        for block in self.tensors[path].blocks:
            length = self._block_length(mixer, block, size)
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
            length, groups = self._block_length(mixer, block), self._entries_per_state(mixer, block)
            if groups:
                first = start + self.state_size(mixer) * torch.arange(groups, device=source.device).unsqueeze(1)
                positions.append(torch.where(source < 0, -1, first + source).flatten())
            else:
                positions.append(torch.arange(start, start + length, device=source.device))
            start += length
        return torch.cat(positions)

    def size_in_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return N of a layer of a checkpoint from the shapes of its state tensors, by path.

        There is no mixer to ask, so this method reads a tensor whose blocks all have a fixed number of entries for
        each state. A family without such a tensor, or with groups, has to override it.
        """
        path, tensor = next(
            (path, tensor) for path, tensor in self.tensors.items() if all(block.per_state for block in tensor.blocks)
        )
        return shapes[path][tensor.axis] // sum(block.per_state for block in tensor.blocks)

    def layers_of_config(self, config: Mapping) -> list[int]:
        """Return the indices of the layers that have a state, from the content of a `config.json`; here, of all."""
        return list(range(config["num_hidden_layers"]))

    # Checks and records of a model's sizes

    def check_mixer(self, mixer: nn.Module, index: int) -> None:
        """Refuse a mixer whose tensors are not as the family declares them.

        Raises:
            ValueError: a tensor does not have the size that the mixer states.
        """
        for path, tensor in self.tensors.items():
            given, expected = mixer.get_parameter(path).shape[tensor.axis], self.axis_length(mixer, path)
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
        """Return a warning for a user whose model would train with a needlessly slow scan, or None.

        Args:
            device_type: where the model is, such as "cpu" or "cuda".
        """
        return None

    # Numbers for the model card

    @abstractmethod
    def values_per_state(self, config: Mapping) -> int:
        """Return how many numbers a sequence carries for each state of a layer, by the content of a `config.json`."""

    def parameters_per_state(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many parameters each state of a layer has, from the shapes of its state tensors, by path.

        As in `size_in_weights`, there is no mixer to ask: a family with groups has to override this method.
        """
        return sum(
            sum(block.per_state for block in tensor.blocks) * math.prod(shapes[path]) // shapes[path][tensor.axis]
            for path, tensor in self.tensors.items()
        )

    def _block_length(self, mixer: nn.Module, block: Block, size: int | None = None) -> int:
        per_state = self._entries_per_state(mixer, block)
        if not per_state:
            return getattr(mixer, block.name)
        return per_state * (self.state_size(mixer) if size is None else size)

    def _entries_per_state(self, mixer: nn.Module, block: Block) -> int:
        return getattr(mixer, block.per_state) if isinstance(block.per_state, str) else block.per_state


class SelectiveFamily(Family):
    """A selective family has layers whose maps depend on their input: Mamba-1 and its kin.

    A cut keeps some states of each layer as they are and drops the others. Each forward pass of a mixer runs one scan
    over its D channels, with one B and one C for all of them (arXiv 2312.00752, algorithm 2), or, where it has heads,
    one for each. Then `maps` and `layer_output` return tuples with an entry for each head.

    Attributes:
        decay: path of the parameter that holds log(-A), (D, N), or (heads, D, N).
        output_projection: path of the weight that mixes the D channels, (hidden, D).
    """

    needs_data = True
    is_language_model = True
    can_refit = True
    can_allocate_globally = True
    decay: str
    output_projection: str

    @abstractmethod
    def maps(self, tensors: Mapping[str, Tensor], mixer: nn.Module, size: int | None = None) -> StateMaps:
        """Return the maps of a layer, as views into its tensors, so that a change of a map changes the tensor.

        Args:
            tensors: the whole state tensors, by path, or other tensors of the same shapes, such as gradients.
            size: the number of states that the tensors have, where it is not the mixer's own N.

        Returns:
            The rows that make B and those that make C, (N, D) each, and log(-A), (D, N).
        """

    @abstractmethod
    def observed_scan(self, observer: Observer) -> AbstractContextManager[None]:
        """Return a context manager within which the observer runs every scan of the family's models in eval mode."""

    @abstractmethod
    def layer_output(self, mixer: nn.Module) -> Callable[[StateMaps, LayerInputs], Tensor]:
        """Return a function that computes what a layer adds to the residual stream from its maps and its inputs.

        A refit fits the output of this function, so what no cut changes (a skip connection, a bias) may be left out.
        Every process has to call this method, since each may hold only a part of a tensor.

        Returns:
            (maps, inputs) → (batch, hidden, L), differentiable in the maps.
        """

    def reduce(self, entry: Selection, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Give the kept states, in place, the maps by which they make up for the dropped ones."""
        self.write_maps(entry.maps_after_cut(self.maps(old, mixer)), mixer, new)

    def write_maps(self, maps: StateMaps, mixer: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Write maps, in place, into the whole state tensors of a layer, by path."""
        for target, value in zip(self.maps(tensors, mixer, len(maps.B_rows)), maps, strict=True):
            target.copy_(value)

    def masked(self, mixer: nn.Module, entry: Selection) -> dict[str, Tensor]:
        """Return the tensors with zero rows of B and C for dropped states, and the maps after the cut for kept ones.

        Only a refit changes decay rates; a tensor that does not change is left out.
        """
        tensors = {path: full_tensor(mixer.get_parameter(path).detach()) for path in self.tensors}
        changed = {path: tensor.clone() for path, tensor in tensors.items()}
        whole = self.maps(changed, mixer)
        after = entry.maps_after_cut(whole)
        kept_states = entry.kept_states.to(whole.B_rows.device)
        dropped = complement(kept_states, len(whole.B_rows))
        for rows, values in ((whole.B_rows, after.B_rows), (whole.C_rows, after.C_rows)):
            rows[dropped], rows[kept_states] = 0, values
        whole.A_log[:, kept_states] = after.A_log
        return {path: value for path, value in changed.items() if not torch.equal(value, tensors[path])}


class TimeInvariantFamily(Family):
    """A time-invariant family has diagonal layers, whose system balanced truncation replaces by a smaller one.

    The cut layer has new coordinates, so its gradients and its optimizer state start afresh.
    """

    needs_data = False
    is_language_model = False

    @abstractmethod
    def system(self, mixer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the system of a layer, h_k = λ h_{k-1} + B u_k, y_k = C h_k, or one whose real part the layer gives.

        The parameters of the mixer are whole tensors during this call.

        Returns:
            λ, (N,), B, (N, H_in), and C, (H_out, N), complex128.
        """

    @abstractmethod
    def tensors_of(self, mixer: nn.Module, eigenvalues: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """Return the state tensors, float64, by path, of a layer that has this system: the inverse of `system`."""

    def reduce(self, entry: Projection, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Copy the tensors of the smaller system into `new`."""
        for path in entry.tensors:
            new[path].copy_(entry.tensors[path])

    def masked(self, mixer: nn.Module, entry: Projection) -> dict[str, Tensor]:
        """Return the tensors of the smaller system: a layer computes at the size of the tensors that it is given."""
        parameters = {path: mixer.get_parameter(path) for path in entry.tensors}
        return {path: entry.tensors[path].to(old.device, old.dtype) for path, old in parameters.items()}
