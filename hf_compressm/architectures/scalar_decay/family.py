"""A family with scalar decay has layers like those of Mamba-2: one decay for a head, B and C shared by some heads.

The mathematics is in `theory.scalar_decay`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines import full_tensor
from ...kernels.scalar_decay_scan import effective_time_step, scalar_decay_scan
from ..family import Family
from .mamba2_scan import NO_LIMIT, SCAN

LAYERS_WITH_STATE = ("linear_attention", "hybrid", "mamba")  # the last is the older name of the first


class GroupInputs(NamedTuple):
    """Group inputs are what a scan with scalar decay is given.

    Attributes:
        x: (batch, L, heads, p).
        time_step: effective Δ, (batch, L, heads).
        A: decay rates, negative, (heads,).
        B, C: (batch, L, G, N).
    """

    x: Tensor
    time_step: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


class GroupLayerInputs(NamedTuple):
    """Group layer inputs are all that the output of a layer is made of, beside its parameters.

    Attributes:
        features: what `in_proj` is given, (batch, L, hidden).
        scan: what the scan is given.
        gate: z, (batch, L, heads · p).
        mask: 1 for tokens that count, 0 for padding, (batch, L), or None.
    """

    features: Tensor
    scan: GroupInputs
    gate: Tensor
    mask: Tensor | None


# An observer is told of every scan: what it is given, and y, (batch, L, heads · p), with the skip connection D x.
GroupObserver = Callable[[GroupInputs, Tensor], None]


class ScalarDecayFamily(Family):
    """A family of this kind has mixers as Mamba-2's (arXiv 2405.21060), which share B and C within groups of heads.

    Attributes:
        modeling: the module of Transformers that defines the mixer.
        heads_field, head_dim_field, groups_field, convolution_field: the fields of the config that hold these numbers;
            the last one is the length of the convolution.
    """

    needs_data = True
    is_language_model = True
    can_refit = True
    can_allocate_globally = True

    def __init__(
        self,
        model_type: str,
        modeling: ModuleType,
        mixer_class: str,
        title: str,
        size_field: str = "mamba_d_state",
        heads_field: str = "mamba_n_heads",
        head_dim_field: str = "mamba_d_head",
        groups_field: str = "mamba_n_groups",
        convolution_field: str = "mamba_d_conv",
    ):
        self.model_types, self.modeling, self.mixer_class, self.title = (model_type,), modeling, mixer_class, title
        self.size_field, self.heads_field = size_field, heads_field
        self.head_dim_field, self.groups_field = head_dim_field, groups_field
        self.convolution_field = convolution_field

    def layer_count_of_config(self, config: Mapping) -> object:
        """Return the number of layers, which some models give by the list of their types alone."""
        types = _layer_types(config)
        return super().layer_count_of_config(config) if types is None else len(types)

    def layers_of_config(self, config: Mapping) -> list[int]:
        """Return the layers that have a state, by whichever field tells it; others hold attention or experts alone."""
        types = _layer_types(config)
        if types is not None:
            return [index for index, layer_type in enumerate(types) if layer_type in LAYERS_WITH_STATE]
        without = config.get("attn_layer_indices") or []
        return [index for index in range(config["num_hidden_layers"]) if index not in without]

    @contextmanager
    def observed_scan(self, observer: GroupObserver) -> Iterator[None]:
        """Let the observer be told of every scan of the family's models in eval mode within this block."""
        scan = getattr(self.modeling, SCAN)

        def observed(hidden_states, dt, A, B, C, *args, dt_bias=None, dt_softplus=False, dt_limit=NO_LIMIT, **kwargs):
            options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
            result = scan(hidden_states, dt, A, B, C, *args, **options, **kwargs)
            time_step = effective_time_step(dt, dt_bias, dt_softplus, dt_limit)
            y = result[0] if isinstance(result, tuple) else result
            observer(GroupInputs(hidden_states, time_step, A, B, C), y.flatten(2))
            return result

        setattr(self.modeling, SCAN, observed)
        try:
            yield
        finally:
            setattr(self.modeling, SCAN, scan)

    def groups(self, mixer: nn.Module) -> int:
        """Return G, the number of groups of heads that have a B and a C of their own."""
        return mixer.n_groups

    def gate(self, mixer: nn.Module, projected: Tensor) -> Tensor:
        """Return z, (batch, L, heads · p), from what `in_proj` gives."""
        gate = projected[..., : mixer.intermediate_size]
        multipliers = getattr(mixer, "mup_vector", None)  # of Falcon-H1
        return gate if multipliers is None else gate * multipliers[..., : mixer.intermediate_size]

    def channel_weights(self, mixer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of y and z that weighs an error in each channel of the scan's output.

        The weight of channel d is silu(z_d)² ‖column d of out_proj‖², and where a gated RMS norm lies between, times
        its own weight squared over the mean square that it divides by. What the error changes of that mean square, and
        products of errors in different channels, are left out. Every process has to call this method.

        Returns:
            (y, z), (…, heads · p) each → w, float64, (…, heads · p).
        """
        columns = full_tensor(mixer.out_proj.weight.detach()).double().square().sum(0)
        has_norm = getattr(mixer.norm, "weight", None) is not None
        if has_norm:
            columns = columns * full_tensor(mixer.norm.weight.detach()).double().square()
        norm_comes_first = getattr(mixer.norm, "norm_before_gate", False)

        def weights(y: Tensor, z: Tensor) -> Tensor:
            y, gain = y.double(), F.silu(z.double()).square()
            if not has_norm:
                return columns * gain
            squares = y.square() if norm_comes_first else y.square() * gain
            groups = squares.unflatten(-1, (mixer.n_groups, -1))
            mean_square = (groups.mean(-1, keepdim=True) + mixer.norm.variance_epsilon).expand_as(groups)
            return columns * gain / mean_square.flatten(-2)

        return weights

    def layer_output(self, mixer: nn.Module) -> Callable[[dict[str, Tensor], GroupLayerInputs], Tensor]:
        """Return a function that computes what a layer adds to the residual stream, but for a bias of `out_proj`.

        Every process has to call this method, since each may hold only a part of a tensor.

        Returns:
            (maps, inputs) → (batch, hidden, L), differentiable in the maps: what `input_and_output_maps` takes.
        """
        D, projection = (full_tensor(each.detach()) for each in (mixer.D, mixer.out_proj.weight))
        weight = getattr(mixer.norm, "weight", None)
        weight = None if weight is None else full_tensor(weight.detach())
        norm_comes_first = getattr(mixer.norm, "norm_before_gate", False)

        def normalised(y: Tensor) -> Tensor:
            if weight is None:
                return y
            groups = y.unflatten(-1, (mixer.n_groups, -1))
            scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
            return weight.to(y) * (groups * scale).flatten(-2)

        def output(maps: dict[str, Tensor], inputs: GroupLayerInputs) -> Tensor:
            with torch.autocast(inputs.features.device.type, enabled=False):
                dtype = next(iter(maps.values())).dtype
                x, time_step, A, *_ = (tensor.to(dtype) for tensor in inputs.scan)
                y = scalar_decay_scan(x, time_step, A, *self.input_and_output_maps(mixer, maps, inputs), D.to(x))
                y, gain = y.flatten(2), F.silu(inputs.gate.to(dtype))
                y = normalised(y) * gain if norm_comes_first else normalised(y * gain)
                return torch.einsum("hd,bld->bhl", projection.to(y), y)

        return output

    @abstractmethod
    def input_and_output_maps(
        self, mixer: nn.Module, maps: dict[str, Tensor], inputs: GroupLayerInputs
    ) -> tuple[Tensor, Tensor]:
        """Return B and C, (batch, L, G, r) each, that these maps make.

        Args:
            maps: by path, what a refit moves.
        """

    def values_per_state(self, config: Mapping) -> int:
        """Return heads · p: each channel of each head has one number for each state."""
        return self.count_of_config(config, self.heads_field) * self.count_of_config(config, self.head_dim_field)

    def refit_values(self, config: Mapping, size: int) -> int:
        """Return those that `in_proj` is given and gives, and those that the convolution makes of x, B and C."""
        inner = self.values_per_state(config)
        heads, groups = (self.count_of_config(config, field) for field in (self.heads_field, self.groups_field))
        return config["hidden_size"] + 3 * inner + 4 * groups * size + 2 * heads

    def convolution_values(self, config: Mapping, size: int) -> int:
        """Return (heads · p + 2 G N) (k - 1): the convolution of k taps runs over x, B and C."""
        channels = self.values_per_state(config) + 2 * self.count_of_config(config, self.groups_field) * size
        return channels * (self.count_of_config(config, self.convolution_field) - 1)


def _layer_types(config: Mapping) -> list | None:
    types = config.get("layers_block_type") or config.get("layer_types")
    return types if isinstance(types, list) else None
