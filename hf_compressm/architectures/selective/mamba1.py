"""The families whose mixers are those of Mamba-1 share what is here: where states lie, and how a layer computes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engines import full_tensor
from ...kernels import selective_scan
from ...theory.selective import LayerInputs, StateMaps
from ..family import Block, Family, StateTensor, check_projections
from ..installed_scan import observed_scan, reference_would_run
from .family import Observer, SelectiveFamily

LIMITS = (
    "The reduction is axis-aligned (a state is dropped for all channels of a layer at once), and selective layers "
    "have no error bound: the measured losses above take its place. The singular values are those of a "
    "time-invariant surrogate of each layer."
)


class Mamba1Family(SelectiveFamily):
    """In a mixer of Mamba-1 (arXiv 2312.00752) B and C are linear in the layer's input, and A differs by channel."""

    size_attribute = "ssm_state_size"
    tensors = {  # noqa: RUF012
        "x_proj.weight": StateTensor(axis=0, blocks=(Block("time_step_rank", per_state=0), Block("B"), Block("C"))),
        "A_log": StateTensor(axis=1),
    }
    decay = "A_log"
    output_projection = "out_proj.weight"
    convolution_field = "conv_kernel"
    limits = LIMITS

    def check_mixer(self, mixer: nn.Module, index: int) -> None:
        """Refuse what the base class refuses, an `x_proj` that is no plain linear layer, and a packed `out_proj`.

        Raises:
            ValueError: `x_proj` is of another class, the weight of `out_proj` is no parameter, or a tensor does not
                have the size that the mixer states.
        """
        check_projections(mixer, index, "x_proj")
        super().check_mixer(mixer, index)

    def is_per_layer(self, model: nn.Module) -> bool:
        """Return False: the model knows one size for all layers."""
        return False

    def record_in_mixer(self, mixer: nn.Module, size: int) -> None:
        """Update N in the mixer, and the number of outputs that its projection states."""
        super().record_in_mixer(mixer, size)
        mixer.x_proj.out_features = mixer.x_proj.weight.shape[0]

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Update N in the config."""
        setattr(model.config, self.size_field, max(sizes.values()))

    def maps(self, tensors: Mapping[str, Tensor], mixer: nn.Module, size: int | None = None) -> StateMaps:
        """Return the rows of `x_proj.weight` that make B and C, and `A_log`, as views."""
        projection = tensors["x_proj.weight"]
        B, C = (self.block_slice(mixer, "x_proj.weight", name, size) for name in ("B", "C"))
        return StateMaps(projection[B], projection[C], tensors["A_log"])

    def observed_scan(self, observer: Observer) -> AbstractContextManager[None]:
        """Return a context manager that replaces the scan that Transformers' layers call by the observer."""
        return observed_scan(observer)

    def layer_output(self, mixer: nn.Module) -> Callable[[StateMaps, LayerInputs], Tensor]:
        """Return a function that computes W_out (silu(z) ⊙ y), where y is the scan without the skip connection D u."""
        projection = full_tensor(mixer.out_proj.weight.detach())
        return scan_output(projection, partial(self.input_and_output_maps, mixer))

    def input_and_output_maps(self, mixer: nn.Module, maps: StateMaps, u: Tensor) -> list[Tensor]:
        """Return B and C, (batch, N, L) each, for u, (batch, D, L)."""
        return linear_maps(maps, u)

    def initialise(self, mixer: nn.Module, new: dict[str, Tensor], size: int, generator) -> None:
        """Draw rows of B as the initialiser does, leave rows of C at zero, and continue the decay rates -1, -2, …"""
        old_size, maps = self.state_size(mixer), self.maps(new, mixer, size)
        rows = maps.B_rows[old_size:]
        rows.copy_(torch.empty(rows.shape).normal_(0, mixer.config.initializer_range, generator=generator))
        maps.A_log[:, old_size:] = torch.arange(old_size + 1, size + 1).log().to(maps.A_log)

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """Yield `A_log`: weight decay would pull all decay rates together, and bias the scores with them."""
        yield mixer.A_log

    def slow_scan(self, device_type: str) -> str | None:
        """Return a warning where Transformers' own loop would run, which is quadratic in the sequence length."""
        return slow_scan(self, device_type)

    def values_per_state(self, config: Mapping) -> int:
        """Return the number of channels: each has one number for each state."""
        return config["intermediate_size"]


def linear_maps(maps: StateMaps, u: Tensor) -> list[Tensor]:
    """Return B and C as rows make them of u, (batch, D, L): (batch, N, L) each."""
    return [torch.einsum("nd,bdl->bnl", rows, u) for rows in (maps.B_rows, maps.C_rows)]


def scan_output(
    projection: Tensor, input_and_output_maps: Callable[[StateMaps, Tensor], list[Tensor]] = linear_maps
) -> Callable[[StateMaps, LayerInputs], Tensor]:
    """Return a function that computes W_out (silu(z) ⊙ y), where y is the scan without the skip connection D u.

    Args:
        projection: W_out, (hidden, D).
        input_and_output_maps: maps, u → B and C, (batch, N, L) each.
    """

    def output(maps: StateMaps, inputs: LayerInputs) -> Tensor:
        with torch.autocast(inputs.u.device.type, enabled=False):
            u, time_step = inputs.u.to(maps.A_log), inputs.time_step.to(maps.A_log)
            y = selective_scan(u, time_step, -maps.A_log.exp(), *input_and_output_maps(maps, u))
            y = y if maps.gains is None else y * maps.gains.unsqueeze(1)
            y = y if inputs.gate is None else y * F.silu(inputs.gate.to(y))
            return torch.einsum("hd,bdl->bhl", projection.to(y), y)

    return output


def slow_scan(family: Family, device_type: str) -> str | None:
    """Return a warning where Transformers' own loop would run, which is quadratic in the sequence length."""
    if not reference_would_run(device_type, family.model_types[0]):
        return None
    return (
        f"Transformers' own {family.title} loop is about to run: its training step is quadratic in the sequence "
        "length. Call hf_compressm.install_scan() before training, or install mamba-ssm on a GPU."
    )
