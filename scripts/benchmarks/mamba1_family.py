"""Mamba-1: its selective scan by this package, mamba-ssm, mambapy and Transformers' loop, and its models."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.utils.import_utils import is_mambapy_available

from hf_compressm.architectures.foreign_kernels import reference_of
from hf_compressm.architectures.replaced_functions import original_function
from hf_compressm.kernels import selective_scan

from .arguments import Arguments
from .family import MAMBA_SSM, Family, Shape
from .measuring import Work

LOOP, MAMBAPY = "Transformers' loop", "mambapy"

# Per channel, state and position: Δ A, its power of two (six multiply-adds), Δ u B, the recurrence, C h; going back,
# the first four again and seven multiply-adds and two products for the gradients.
EXPONENTIAL_FLOPS = 12
FLOPS = (1 + EXPONENTIAL_FLOPS + 1 + 2 + 2) + (1 + EXPONENTIAL_FLOPS + 1 + 2 + 7 * 2)


class Mamba1(Family):
    """A Mamba: each channel has a decay of its own for each state."""

    model_type = "mamba"
    title = "Mamba-1"
    implementations = ("cpp", "triton", "torch")
    bases = ("axis",)
    inputs = ("u", "dt", "A", "B", "C", "D", "z", "delta_bias")
    checked = Shape(batch=2, length=50, channels=70, state_size=1)
    size_by_length = 16

    def __init__(self, args: Arguments):
        super().__init__(args)
        self.shape = Shape(args.batch_size, args.length, 2 * args.hidden_size, args.state_size)
        self.state_sizes, self.lengths = args.state_sizes, args.lengths
        self.step_sizes, self.size_after = args.step_sizes, args.size_after
        loop = reference_of(original_function(modeling_mamba, "mamba_selective_scan"))  # even beside mamba-ssm
        self.reference = partial(loop, delta_softplus=True)
        self.of_transformers = {MAMBAPY: {"use_mambapy": True}} if args.device == "cpu" else {}

    def scans(self) -> dict[str, Callable[..., Tensor]]:
        found = {name: partial(_own_scan, name) for name in self.own_scans}
        if self.has_mamba_ssm:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            found[MAMBA_SSM] = partial(selective_scan_fn, delta_softplus=True)
        if self.args.device == "cpu" and self.args.dtype == "float32":  # the states of both have the inputs' dtype
            if not is_mambapy_available():
                raise ValueError(
                    "mambapy is missing, and Transformers would silently run its loop: pip install mambapy."
                )
            found[MAMBAPY] = partial(self.reference, use_mambapy=True)
            found[LOOP] = self.reference
        return found

    def scan_inputs(self, shape: Shape) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.args.seed)
        random = partial(torch.randn, generator=generator)
        batch, length, channels, size = shape.batch, shape.length, shape.channels, shape.state_size
        step = torch.empty(channels).uniform_(math.log(0.001), math.log(0.1), generator=generator).exp()
        values = {
            "u": F.silu(random(batch, length, channels)).transpose(1, 2),
            "dt": 0.1 * random(batch, length, channels).transpose(1, 2),
            "A": -torch.arange(1.0, size + 1).repeat(channels, 1),
            "B": random(batch, length, size).transpose(1, 2),
            "C": random(batch, length, size).transpose(1, 2),
            "D": torch.ones(channels),
            "z": random(batch, length, channels).transpose(1, 2),
            "delta_bias": step.expm1().log(),  # inverse of softplus
        }
        moved = self.narrow(values, exact=("A", "D", "delta_bias"))
        return moved, random(batch, length, channels).transpose(1, 2).to(self.args.device)

    def least_work(self, shape: Shape, dtype: torch.dtype) -> Work:
        """Count inputs twice, y and its gradient, and gradients once; parameters are small."""
        by_channel = 2 * 3 + 2 + 3  # u, Δ, z; y and its gradient; the gradients of u, Δ, z
        by_state = 2 * 2 + 2  # B, C; their gradients
        positions = shape.batch * shape.length
        values = positions * (by_channel * shape.channels + by_state * shape.state_size)
        return Work(values * dtype.itemsize, FLOPS * positions * shape.channels * shape.state_size)

    def build(self, size: int, **options) -> MambaForCausalLM:
        config = MambaConfig(
            vocab_size=self.args.vocab_size,
            hidden_size=self.args.hidden_size,
            num_hidden_layers=self.args.num_hidden_layers,
            state_size=size,
            **options,
        )
        return MambaForCausalLM(config).to(self.args.device)


def _own_scan(name: str, u, dt, A, B, C, D, z, bias) -> Tensor:
    return selective_scan(u, dt, A, B, C, D, z, bias, softplus=True, implementation=name)
