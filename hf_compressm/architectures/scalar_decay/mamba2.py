"""Mamba-2 and the hybrids that have its mixer can be cut in two bases.

In the basis "axis" a cut keeps some coordinates of the state of each group of heads: rows of `in_proj` and channels of
the convolution. The model stays one of Transformers' own. In the basis "balanced" it keeps balanced states, made by
two small projections after the convolution, in a class of this package.
"""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines import full_tensor, original_class
from ...theory.group_criteria import GROUP_CRITERIA
from ...theory.plan import GroupSelection
from ...theory.selective import complement
from ..family import Block, ProjectedFamily, StateTensor, check_projections, whole_quotient
from .balanced import BALANCED_CLASSES
from .family import GroupLayerInputs, ScalarDecayFamily
from .mamba2_scan import MODULES

_CHANNELS = (Block("intermediate_size", 0), Block("B", "n_groups"), Block("C", "n_groups"))  # of the convolution
_FEATURES = (Block("intermediate_size", 0), *_CHANNELS, Block("num_heads", 0))  # of in_proj: z, x, B, C, Δ


class AxisFamily(ScalarDecayFamily):
    """The classes of Transformers are cut in the basis "axis"; in the other they become those of a balanced family."""

    bases = ("axis", "balanced")
    criteria = tuple(GROUP_CRITERIA)
    size_attribute = "ssm_state_size"
    tensors = {  # noqa: RUF012
        "in_proj.weight": StateTensor(0, _FEATURES),
        "in_proj.bias": StateTensor(0, _FEATURES, is_optional=True),
        "conv1d.weight": StateTensor(0, _CHANNELS),
        "conv1d.bias": StateTensor(0, _CHANNELS, is_optional=True),
    }
    limits = (
        "The reduction is axis-aligned: each group of heads keeps some coordinates of its state, so that the model "
        "stays one that every tool loads. Balanced states (basis = 'balanced') lose less, in a class of their own."
    )

    def check_mixer(self, mixer: nn.Module, index: int) -> None:
        """Refuse what the base class refuses, an `in_proj` that is no plain linear layer, and an unusual activation.

        Raises:
            ValueError: `in_proj` is of another class, the weight of `out_proj` is no parameter, the activation is not
                zero at zero, or a tensor does not have the size that the mixer states.
        """
        check_projections(mixer, index, "in_proj")
        if mixer.act(torch.zeros(1)) != 0:
            raise ValueError(
                f"layer {index}: the activation {mixer.activation!r} of B and C is not zero at zero, as silu is, so "
                "no state could be masked."
            )
        super().check_mixer(mixer, index)

    def size_in_weights(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> int:
        """Return N of a layer of a checkpoint, from the number of channels of its convolution."""
        inner, groups = self.values_per_state(config), self.count_of_config(config, self.groups_field)
        channels = shapes["conv1d.weight"][0]
        size = whole_quotient(channels - inner, 2 * groups, "conv1d.weight")
        features = inner + channels + self.count_of_config(config, self.heads_field)
        for path, shape in shapes.items():
            expected = features if path.startswith("in_proj.") else channels
            if shape[0] != expected:
                raise ValueError(f"{path} has the shape {shape}; {expected} entries belong to {size} states.")
        return size

    def is_per_layer(self, model: nn.Module) -> bool:
        """Return False: the classes of Transformers have one size for all layers."""
        return False

    def check_per_layer(self, model: nn.Module) -> None:
        """Refuse layers of different sizes, and name the basis in which they are possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"layers of a {type(model).__name__} would have state sizes of their own; it knows one for all. Set "
            "allocation='uniform', or basis='balanced', in which each layer may have its own."
        )

    def record_in_mixer(self, mixer: nn.Module, size: int) -> None:
        """Update N in the mixer, and what its modules state of their sizes."""
        super().record_in_mixer(mixer, size)
        mixer.in_proj.out_features = self.axis_length(mixer, "in_proj.weight")
        channels = self.axis_length(mixer, "conv1d.weight")
        mixer.conv_dim = mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = channels
        if hasattr(mixer, "mup_vector"):  # Falcon-H1's multipliers, one for each block of in_proj's features
            multipliers, start = mixer.mup_vector, 0
            old_size = whole_quotient(
                multipliers.shape[-1] - self.axis_length(mixer, "in_proj.weight", 0), 2 * mixer.n_groups, "mup_vector"
            )
            parts = []
            for block in _FEATURES:
                parts.append(multipliers[..., start : start + 1].expand(1, 1, self.block_length(mixer, block)))
                start += self.block_length(mixer, block, old_size)
            mixer.mup_vector = torch.cat(parts, -1)
            mixer.groups_time_state_size = mixer.n_groups * size

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Update the config's field for N."""
        setattr(model.config, self.size_field, max(sizes.values()))

    def state_entries(self, mixer: nn.Module, path: str, size: int | None = None) -> slice:
        """Return where B and C lie side by side on the state axis of a tensor."""
        B, C = (self.block_slice(mixer, path, name, size) for name in ("B", "C"))
        return slice(B.start, C.stop)

    def reduce(self, entry: GroupSelection, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Add what a refit adds to the entries of B and C."""
        for path, added in entry.tensors.items():
            new[path][self.state_entries(mixer, path, entry.size)] += added.to(new[path])

    def masked(self, mixer: nn.Module, entry: GroupSelection) -> dict[str, Tensor]:
        """Return the tensors with zero taps and biases for B and C of dropped states, so that SiLU gives zero.

        Those of kept states have what a refit adds; a tensor that does not change is left out.
        """
        kept = entry.kept_states.cpu()
        dropped = torch.stack([complement(of_group, self.state_size(mixer)) for of_group in kept])
        masked = {}
        for path in self.paths(mixer):
            is_of_convolution = path.startswith("conv1d.")
            if is_of_convolution or path in entry.tensors:
                tensor = full_tensor(mixer.get_parameter(path).detach()).clone()
                channels = tensor[self.state_entries(mixer, path)]  # a view
                if path in entry.tensors:
                    channels[self._entries(mixer, kept)] += entry.tensors[path].to(channels)
                if is_of_convolution:
                    channels[self._entries(mixer, dropped)] = 0
                masked[path] = tensor
        return masked

    def channel_maps(
        self, mixer: nn.Module, tensors: Mapping[str, Tensor], states: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the entries of B and C of some states, or of all, that a refit moves, by path.

        Args:
            tensors: the whole state tensors, by path.
            states: (G, r), or None.
        """
        entries = {path: tensor[self.state_entries(mixer, path)] for path, tensor in tensors.items()}
        if states is None:
            return entries
        kept = self._entries(mixer, states.cpu())
        return {path: tensor[kept.to(tensor.device)] for path, tensor in entries.items()}

    def input_and_output_maps(
        self, mixer: nn.Module, maps: dict[str, Tensor], inputs: GroupLayerInputs
    ) -> tuple[Tensor, Tensor]:
        """Return B and C as `in_proj`, the convolution and its activation make them."""
        taps, size = maps["conv1d.weight"], len(maps["conv1d.weight"]) // 2
        projected = F.linear(inputs.features.to(taps), maps["in_proj.weight"], maps.get("in_proj.bias"))
        if hasattr(mixer, "mup_vector"):
            starts = [self.block_slice(mixer, "in_proj.weight", name).start for name in ("B", "C")]
            multipliers = mixer.mup_vector.flatten()[starts].to(projected)
            projected = projected * multipliers.repeat_interleave(size)
        convolved = F.conv1d(projected.mT, taps, maps.get("conv1d.bias"), padding=taps.shape[-1] - 1, groups=len(taps))
        BC = mixer.act(convolved[..., : projected.shape[1]]).mT
        return tuple(each.unflatten(-1, (self.groups(mixer), -1)) for each in BC.split(size, -1))

    def _entries(self, mixer: nn.Module, states: Tensor) -> Tensor:
        """Return the positions of states, (G, r), where B and C lie side by side: those of B, then those of C."""
        of_B = (states + self.state_size(mixer) * torch.arange(len(states)).unsqueeze(1)).flatten()
        return torch.cat([of_B, of_B + self.state_size(mixer) * len(states)])

    def magnitudes(self, mixer: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ‖row of in_proj‖ · ‖taps‖ of the channels of B and of C, (G, N) each.

        Args:
            tensors: the whole state tensors, by path.
        """
        norms = (
            tensors[path][self.state_entries(mixer, path)].flatten(1).norm(dim=1)
            for path in ("in_proj.weight", "conv1d.weight")
        )
        return tuple(math.prod(norms).view(2, self.groups(mixer), -1))

    def saliencies(self, mixer: nn.Module, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
        """Return Σ gradient · weight over taps and biases of the channels of B and C of each state, (G, N).

        Args:
            tensors, gradients: the whole state tensors and the gradients for them, by path.
        """
        total = 0
        for path in (path for path in tensors if path.startswith("conv1d.")):
            entries = self.state_entries(mixer, path)
            products = gradients[path][entries].double() * tensors[path][entries].double()
            total = total + products.view(len(products), -1).sum(1).view(2, self.groups(mixer), -1).sum(0)
        return total

    def initialise(self, mixer: nn.Module, new: dict[str, Tensor], size: int, generator) -> None:
        """Draw rows of B as large as those that are there, and taps as a convolution does; rows of C stay zero."""
        old_size, rows, taps = self.state_size(mixer), new["in_proj.weight"], new["conv1d.weight"]
        bound = 1 / math.sqrt(taps.shape[-1])
        for name in ("B", "C"):
            for group in range(self.groups(mixer)):
                of_rows, of_taps = (
                    tensor[self.block_slice(mixer, path, name, size)][group * size + old_size : (group + 1) * size]
                    for path, tensor in (("in_proj.weight", rows), ("conv1d.weight", taps))
                )
                of_taps.copy_(torch.empty(of_taps.shape).uniform_(-bound, bound, generator=generator))
                if name == "B":
                    scale = float(rows[self.block_slice(mixer, "in_proj.weight", "B", size)].square().mean().sqrt())
                    of_rows.copy_(torch.empty(of_rows.shape).normal_(0, scale, generator=generator))

    def parameters_per_state(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> int:
        """Return how many parameters the channels of B and C of a state have in all groups."""
        return sum(
            2 * self.count_of_config(config, self.groups_field) * math.prod(shape[1:]) for shape in shapes.values()
        )


class BalancedFamily(ProjectedFamily, ScalarDecayFamily):
    """The balanced classes keep balanced states: B and C are projected by W and V, (G, r, N) each, before the scan."""

    bases = ("balanced",)
    size_attribute = "reduced_state_size"
    tensors = {"B_proj": StateTensor(1), "C_proj": StateTensor(1)}  # noqa: RUF012
    limits = (
        "Each layer keeps the balanced states of largest Hankel singular value. Their expected squared error in the "
        "layer's output is the sum of the squares of the others, if states and read-outs are uncorrelated."
    )

    def __init__(self, plain: AxisFamily):
        mixer = BALANCED_CLASSES[getattr(plain.modeling, plain.mixer_class)]
        fields = ("heads_field", "head_dim_field", "groups_field", "convolution_field")
        names = (getattr(plain, field) for field in fields)
        super().__init__(
            f"compressm_{plain.model_types[0]}",
            plain.modeling,
            mixer.__name__,
            f"balanced {plain.title}",
            "balanced_state_size",
            *names,
        )
        self.plain = plain

    def state_size(self, mixer: nn.Module) -> int:
        """Return r of one layer; N while it does not project."""
        return mixer.reduced_state_size or mixer.ssm_state_size

    def size_of_config(self, config: Mapping) -> int | list:
        """Return r of all layers, or a list of r by layer, from the content of a `config.json`."""
        whole, given = config.get(self.plain.size_field), super().size_of_config(config)
        if isinstance(given, list):
            return [whole if size is None else size for size in given]
        return whole if given is None else given

    def size_in_weights(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> int:
        """Return r of a layer of a checkpoint, from its projections, (G, r, N) both."""
        groups, whole = (self.count_of_config(config, name) for name in (self.groups_field, self.plain.size_field))
        size = super().size_in_weights(shapes, config)
        expected = (groups, size, whole)
        for path, shape in shapes.items():
            if shape != expected:
                raise ValueError(f"{path} has the shape {shape}, expected {expected}.")
        return size

    def is_per_layer(self, model: nn.Module) -> bool:
        """Return True: each layer has projections of its own size."""
        return True

    def check_per_layer(self, model: nn.Module) -> None:
        """Let every model have layers of different sizes."""

    def record_in_mixer(self, mixer: nn.Module, size: int) -> None:
        """Update r in the mixer; one of N states does not project."""
        mixer.reduced_state_size = None if size == mixer.ssm_state_size else size

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Update r in the config, one number where all layers have the same."""
        mixers = self.mixers_in(model)
        reduced = [mixers[index].reduced_state_size for index in sizes]
        model.config.balanced_state_size = reduced[0] if len(set(reduced)) == 1 else reduced

    def pad(self, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Refuse the N that the layer has before its projections: with so many it would not project.

        Raises:
            ValueError: the size is not below that N.
        """
        whole, size = mixer.ssm_state_size, new["B_proj"].shape[1]
        if size >= whole:
            raise ValueError(
                f"layer {mixer.layer_idx} has {whole} states before its projections and cannot be padded to {size} "
                f"behind them: give at most {whole - 1}."
            )

    def input_and_output_maps(
        self, mixer: nn.Module, maps: dict[str, Tensor], inputs: GroupLayerInputs
    ) -> tuple[Tensor, Tensor]:
        """Return the B and C of the layer as it is, projected by `B_proj` and `C_proj`."""
        given = inputs.scan.B.to(maps["B_proj"]), inputs.scan.C.to(maps["C_proj"])
        B, C = (
            torch.einsum("blgn,grn->blgr", each, maps[path]) for each, path in zip(given, self.tensors, strict=True)
        )
        return B, C

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """Yield the projections: there is no reason why they should be small."""
        yield mixer.B_proj
        yield mixer.C_proj

    def convolution_values(self, config: Mapping, size: int) -> int:
        """Return what a plain layer of N states keeps: the projections act after the convolution."""
        return super().convolution_values(config, max(size, config[self.plain.size_field]))

    def removed_parameters(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping, states: int) -> int:
        """Return minus the number of entries of the projections, which a plain layer has not."""
        return -sum(map(math.prod, shapes.values()))


AXIS_FAMILIES = (
    AxisFamily(
        "mamba2",
        MODULES["mamba2"],
        "Mamba2Mixer",
        "Mamba-2",
        "state_size",
        "num_heads",
        "head_dim",
        "n_groups",
        "conv_kernel",
    ),
    AxisFamily("bamba", MODULES["bamba"], "BambaMixer", "Bamba"),
    AxisFamily("falcon_h1", MODULES["falcon_h1"], "FalconH1Mixer", "Falcon-H1"),
    AxisFamily("granitemoehybrid", MODULES["granitemoehybrid"], "GraniteMoeHybridMambaLayer", "Granite hybrid"),
    AxisFamily(
        "nemotron_h",
        MODULES["nemotron_h"],
        "NemotronHMamba2Mixer",
        "Nemotron-H",
        "ssm_state_size",
        "mamba_num_heads",
        "mamba_head_dim",
        "n_groups",
        "conv_kernel",
    ),
    AxisFamily(
        "zamba2",
        MODULES["zamba2"],
        "Zamba2MambaMixer",
        "Zamba2",
        "mamba_d_state",
        "n_mamba_heads",
        "mamba_headdim",
        "mamba_ngroups",
    ),
)
BALANCED_FAMILIES = tuple(map(BalancedFamily, AXIS_FAMILIES))


def can_be_balanced(model: nn.Module) -> bool:
    """Return whether a model of an axis family has a balanced class; a class that a user derived has none."""
    return original_class(model) in BALANCED_CLASSES
