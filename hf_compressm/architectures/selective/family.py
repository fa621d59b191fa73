"""A selective family has layers whose maps depend on their input: Mamba-1 and its kin."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ...engines import full_tensor
from ...theory.criteria import CRITERIA
from ...theory.plan import Selection
from ...theory.selective import LayerInputs, StateMaps, complement
from ..family import Family

# An observer runs a scan in the place of the model. It takes the scan's arguments by position, (u, time_step, A, B, C,
# D, gate, time_step_bias, softplus), where D, gate and time_step_bias may be None, and returns (y, last_state).
Observer = Callable[..., tuple[Tensor, Tensor]]


class SelectiveFamily(Family):
    """A selective family has layers whose maps depend on their input: Mamba-1 and its kin.

    A cut keeps some states of each layer as they are and drops the others. Each forward pass of a mixer runs one scan
    over its D channels, with one B and one C for all of them (arXiv 2312.00752, algorithm 2), or, where it has heads,
    one for each. Then `maps` and `layer_output` return tuples with an entry for each head.

    Attributes:
        decay: path of the parameter that holds log(-A), (D, N), or (heads, D, N).
        output_projection: path of the weight that mixes the D channels, (hidden, D).
        convolution_field: the field of the config that holds the length of the convolution, or None without one.
    """

    needs_data = True
    is_language_model = True
    can_refit = True
    can_allocate_globally = True
    criteria = tuple(CRITERIA)
    decay: str
    output_projection: str
    convolution_field: str | None = None

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

    def convolution_values(self, config: Mapping, size: int) -> int:
        """Return D (k - 1): the convolution of k taps runs over the D channels, whatever N is; 0 without one."""
        if self.convolution_field is None:
            return 0
        return self.values_per_state(config) * (self.count_of_config(config, self.convolution_field) - 1)

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
        tensors = {path: full_tensor(mixer.get_parameter(path).detach()) for path in self.paths(mixer)}
        changed = {path: tensor.clone() for path, tensor in tensors.items()}
        whole = self.maps(changed, mixer)
        after = entry.maps_after_cut(whole)
        kept_states = entry.kept_states.to(whole.B_rows.device)
        dropped = complement(kept_states, len(whole.B_rows))
        for rows, values in ((whole.B_rows, after.B_rows), (whole.C_rows, after.C_rows)):
            rows[dropped], rows[kept_states] = 0, values
        whole.A_log[:, kept_states] = after.A_log
        return {path: value for path, value in changed.items() if not torch.equal(value, tensors[path])}

    def refit_values(self, config: Mapping, size: int) -> int:
        """Return 4 D: those of u and Δ, and what `in_proj` gives, of which the gate is a view."""
        return 4 * self.values_per_state(config)
