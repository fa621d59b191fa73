"""The family of Zamba serves hybrids whose Mambas have heads, each with a B and a C of its own.

A head is a Mamba by itself, on its own share of the channels: it has its own scan, its own states are kept, and they
make up for its dropped ones. All heads of a layer keep equally many. The attention that some layers share has no
state.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ...engines import full_tensor
from ...theory.plan import HeadSelection
from ...theory.selective import LayerInputs, StateMaps
from ..family import Block, StateTensor
from ..installed_scan import observed_scan
from ..tensors import cut_tensors
from .family import Observer, SelectiveFamily
from .mamba1 import LIMITS, scan_output, slow_scan


class ZambaFamily(SelectiveFamily):
    """A Zamba (arXiv 2405.16712) has Mambas with heads, and one block of attention that some layers share."""

    model_types = ("zamba",)
    mixer_class = "ZambaMambaMixer"
    size_attribute = "ssm_state_size"
    size_field = "mamba_d_state"
    convolution_field = "mamba_d_conv"
    tensors = {  # noqa: RUF012
        "x_proj_weight": StateTensor(axis=1, blocks=(Block("time_step_rank", per_state=0), Block("B"), Block("C"))),
        "A_log": StateTensor(axis=2),
    }
    decay = "A_log"
    output_projection = "out_proj.weight"
    title = "Zamba"
    limits = LIMITS

    def scans(self, mixer: nn.Module) -> int:
        """Return the number of heads."""
        return mixer.n_mamba_heads

    def source_index(self, mixer: nn.Module, path: str, source: Tensor) -> Tensor:
        """Return the positions that a resize takes entries from: 1-D, or 2-D where heads keep states of their own."""
        if source.ndim == 1:
            return super().source_index(mixer, path, source)
        return torch.stack([super(ZambaFamily, self).source_index(mixer, path, of_head) for of_head in source])

    def is_per_layer(self, model: nn.Module) -> bool:
        """Return False: the model knows one size for all layers."""
        return False

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Update N in the config."""
        model.config.mamba_d_state = max(sizes.values())

    def maps(self, tensors: Mapping[str, Tensor], mixer: nn.Module, size: int | None = None) -> tuple[StateMaps, ...]:
        """Return for each head the rows of `x_proj_weight` that make B and C, and `A_log`, as views."""
        B, C = (self.block_slice(mixer, "x_proj_weight", name, size) for name in ("B", "C"))
        pairs = zip(tensors["x_proj_weight"], tensors["A_log"], strict=True)
        return tuple(StateMaps(projection[B], projection[C], A_log) for projection, A_log in pairs)

    def write_maps(self, maps: tuple[StateMaps, ...], mixer: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Write the maps of all heads, in place, into the whole state tensors of a layer."""
        for targets, values in zip(self.maps(tensors, mixer, len(maps[0].B_rows)), maps, strict=True):
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

    def reduce(self, entry: HeadSelection, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Give the kept states of each head, in place, the maps by which they make up for the dropped ones."""
        pairs = zip(entry.heads, self.maps(old, mixer), strict=True)
        self.write_maps(tuple(head.maps_after_cut(whole) for head, whole in pairs), mixer, new)

    def masked(self, mixer: nn.Module, entry: HeadSelection) -> dict[str, Tensor | int]:
        """Return the tensors of the cut layer and its N, at which the uncut layer computes with them."""
        return cut_tensors(self, mixer, entry)

    def observed_scan(self, observer: Observer) -> AbstractContextManager[None]:
        """Return a context manager that replaces the scan that Transformers' layers call by the observer."""
        return observed_scan(observer)

    def layer_output(self, mixer: nn.Module) -> tuple[Callable[[StateMaps, LayerInputs], Tensor], ...]:
        """Return for each head a function that computes its share of the output, as a Mamba computes its own."""
        projections = full_tensor(mixer.out_proj.weight.detach()).chunk(mixer.n_mamba_heads, dim=1)
        return tuple(scan_output(projection) for projection in projections)

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """Yield `A_log`, and what is not a matrix but has an axis of heads: `D` and the bias of Δ."""
        yield from (mixer.A_log, mixer.D, mixer.dt_proj_bias)

    def slow_scan(self, device_type: str) -> str | None:
        """Return a warning where Transformers' own loop would run, which is quadratic in the sequence length."""
        return slow_scan(self, device_type)

    def values_per_state(self, config: Mapping) -> int:
        """Return the number of channels of all heads: each has one number for each state."""
        return int(config["mamba_expand"] * config["hidden_size"])


ZAMBA = ZambaFamily()
