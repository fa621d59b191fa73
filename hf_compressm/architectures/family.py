"""What one architecture declares of its state: where it lies, what is true of it, and what the library asks of it.

A family is one object of a class in a file of its own; `registry.py` knows all of them. The mathematics lies in
`theory`, the scans in `kernels`: a family connects them with the modules of a Transformers model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..engines import full_tensor
from ..theory.plan import PlanEntry, Projection, Selection
from ..theory.selective import LayerInputs, StateMaps, complement

# An observer runs a scan in the place of the model: of its arguments (u, time_step, A, B, C, D, gate, time_step_bias,
# softplus) it makes (y, last_state).
Observer = Callable[..., tuple[Tensor, Tensor]]


class Block(NamedTuple):
    """Entries that lie side by side on the state axis of a tensor.

    Attributes:
        name: says what they are. Of a block without entries per state it is the attribute of the mixer that holds the
            block's length.
        per_state: how many entries there are for each state: a number, 0 for none, or the attribute of the mixer that
            holds the number (its groups; the states of one group then lie side by side).
    """

    name: str
    per_state: int | str = 1


class StateTensor(NamedTuple):
    """A parameter of the mixer with a state axis: the axis, and the blocks that lie along it, in order."""

    axis: int
    blocks: tuple[Block, ...] = (Block("state"),)


class Family(ABC):
    """What every family declares.

    Attributes:
        model_types: `config.model_type` of its models.
        mixer_class: name of the module that owns the state; it has a `layer_idx` and a `config`.
        size_attribute: the attribute of the mixer that holds N.
        size_field: the field of the config that holds N.
        tensors: path of each parameter within the mixer that has a state axis → where its states lie.
        needs_data: whether the states are ranked by what they do on data, rather than by the weights alone.
        is_language_model: whether its models have a language modelling head, and so a model card.
        can_refit: whether kept states can be fitted to what the uncut layer did.
        can_allocate_globally: whether losses can tell which layer needs its states most.
        title: what the card calls a model of the family.
        limits: what the card says of the reduction's limits.
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

    # Where states lie

    def mixers_in(self, model: nn.Module) -> dict[int, nn.Module]:
        """Layer index → mixer, ascending, whatever sizes the mixers have."""
        names = self.mixer_class, f"FSDP{self.mixer_class}"  # FSDP2 derives a class from that of every module it wraps
        mixers = {module.layer_idx: module for module in model.modules() if type(module).__name__ in names}
        return dict(sorted(mixers.items()))

    def state_size(self, mixer: nn.Module) -> int:
        """N of one layer."""
        return getattr(mixer, self.size_attribute)

    def axis_length(self, mixer: nn.Module, path: str, size: int | None = None) -> int:
        """The number of entries that a tensor has on its state axis, at N = `size` if that is given."""
        return sum(self._block_length(mixer, block, size) for block in self.tensors[path].blocks)

    def size_at(self, mixer: nn.Module, path: str, length: int) -> int:
        """The N at which a tensor has `length` entries on its state axis."""
        fixed = self.axis_length(mixer, path, 0)
        return (length - fixed) // (self.axis_length(mixer, path, 1) - fixed)

    def block_slice(self, mixer: nn.Module, path: str, name: str, size: int | None = None) -> slice:
        """The entries of a block on the state axis of its tensor, at N = `size` if that is given."""
        start = 0
        for block in self.tensors[path].blocks:
            length = self._block_length(mixer, block, size)
            if block.name == name:
                return slice(start, start + length)
            start += length
        raise KeyError(name)

    def source_index(self, mixer: nn.Module, path: str, source: Tensor) -> Tensor:
        """The positions along a tensor's state axis that a resize takes its entries from, -1 where a state is new.

        Args:
            source: for each state after the resize the one it comes from, or -1: (N',) for all groups alike, or
                (groups, N').
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
        """N of a layer, by the shapes of its state tensors as a checkpoint has them, by path.

        This one reads a tensor whose state axis holds nothing but states; a family without such a tensor has its own.
        """
        path, tensor = next(
            (path, tensor) for path, tensor in self.tensors.items() if all(block.per_state for block in tensor.blocks)
        )
        return shapes[path][tensor.axis] // sum(block.per_state for block in tensor.blocks)

    def layers_of_config(self, config: Mapping) -> list[int]:
        """The indices of the layers that have a state, by the content of a `config.json`; here all of them."""
        return list(range(config["num_hidden_layers"]))

    # What a model says of its sizes

    def check_mixer(self, mixer: nn.Module, index: int) -> None:
        """Refuse a mixer whose tensors are not as the family declares them.

        Raises:
            ValueError: a tensor does not have the size that the mixer claims.
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
        """Whether a reduction of this model gives each layer a size of its own, unless it is told otherwise."""

    def check_per_layer(self, model: nn.Module) -> None:
        """Refuse layers with sizes of their own in a model that could not be saved with them.

        Raises:
            ValueError: the class of the model knows one size only; so do all, unless their family says otherwise.
        """
        raise ValueError(
            f"layers of a {type(model).__name__} would have state sizes of their own; it knows one for all. Set "
            "allocation='uniform'."
        )

    def record_in_mixer(self, mixer: nn.Module, size: int) -> None:
        """Make true again what a mixer says of its size, after its tensors were resized."""
        setattr(mixer, self.size_attribute, size)

    @abstractmethod
    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Make true again what the config and the class of a model say of the sizes of all its layers."""

    # What is done to the tensors of a layer

    @abstractmethod
    def reduce(self, entry: PlanEntry, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Finish, in place, the tensors `new` of the kept states, by path, as an entry of a plan says.

        Args:
            old: the layer's tensors before the cut, whole, by path.
        """

    @abstractmethod
    def masked(self, mixer: nn.Module, entry: PlanEntry) -> dict[str, Tensor]:
        """The tensors, by path, with which a layer at its full size computes what it will after the cut.

        Every process has to ask, since a process may hold a part of each tensor.
        """

    def initialise(self, mixer: nn.Module, new: dict[str, Tensor], size: int, generator) -> None:
        """Fill, in place, the entries of states that are new in a layer that grows to `size` states.

        Raises:
            ValueError: layers of this family cannot grow.
        """
        raise ValueError(f"The states of a {self.title} cannot grow; use pad_state.")

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters of a mixer that weight decay would ruin."""
        return iter(())

    def slow_scan(self, device_type: str) -> str | None:
        """What to tell who trains a model with a scan that is slower than need be; None where it is not."""
        return None

    # What a card says

    @abstractmethod
    def values_per_state(self, config: Mapping) -> int:
        """How many numbers a sequence carries for each state of a layer, by the content of a `config.json`."""

    def parameters_per_state(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many parameters each state of a layer has, by the shapes of its state tensors, by path."""
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
    """Layers whose maps depend on their input: Mamba-1 and its kin. States are kept or dropped as they are.

    Attributes:
        decay: path of the parameter that holds log(-A), (D, N).
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
        """Views of the maps in a layer's tensors, by path, which have `size` states if not the mixer's own number."""

    @abstractmethod
    def observed_scan(self, observer: Observer) -> AbstractContextManager[None]:
        """A block in which the observer runs every scan of a model of the family in eval mode."""

    @abstractmethod
    def layer_output(self, mixer: nn.Module) -> Callable[[StateMaps, LayerInputs], Tensor]:
        """What a layer adds to the residual stream, (batch, hidden, L), as a function of its maps and inputs.

        It is differentiable in the maps. Every process has to ask for it.
        """

    def reduce(self, entry: Selection, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Give the kept states the maps by which they make up for the dropped ones."""
        kept = self.maps(new, mixer, len(entry.kept_states))
        for target, value in zip(kept, entry.maps_after_cut(self.maps(old, mixer)), strict=True):
            target.copy_(value)

    def masked(self, mixer: nn.Module, entry: Selection) -> dict[str, Tensor]:
        """Rows of B and C that make dropped states are zero, the kept ones are as the cut leaves them.

        Decay rates change by a refit only; a tensor that does not change is left out.
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
    """Diagonal time-invariant layers: balanced truncation replaces their system by a smaller one."""

    needs_data = False
    is_language_model = False

    @abstractmethod
    def system(self, mixer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """(λ, B, C) of a layer, complex128: (N,), (N, H_in) and (H_out, N). All parameters are whole."""

    @abstractmethod
    def tensors_of(self, mixer: nn.Module, eigenvalues: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """The state tensors, float64, by path, of a layer that has this system: the inverse of `system`."""

    def reduce(self, entry: PlanEntry, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Put the tensors of the smaller system in place."""
        for path in entry.tensors:
            new[path].copy_(entry.tensors[path])

    def masked(self, mixer: nn.Module, entry: Projection) -> dict[str, Tensor]:
        """The tensors of the smaller system, which compute at their own size."""
        parameters = {path: mixer.get_parameter(path) for path in entry.tensors}
        return {path: entry.tensors[path].to(old.device, old.dtype) for path, old in parameters.items()}
