"""A family of models is what every study is given: its scans, the least that they do, and models of any state size."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compressm.architectures.installed_scan import kernel_in_force
from hf_compressm.kernels.dispatch import PREFERENCE, scan_name

from .arguments import Arguments
from .measuring import Work

MAMBA_SSM = "mamba_ssm"  # as `kernels.dispatch` calls it


@dataclass(frozen=True)
class Shape:
    """The shape of what a scan is given: batch, L, channels of the layer, N."""

    batch: int
    length: int
    channels: int
    state_size: int


class Family(ABC):
    """A family knows its models and scans at the sizes that the arguments ask for.

    Args:
        args: sizes, and the device.

    Attributes:
        shape: that of a scan at which all are compared, and of the training batches.
        state_sizes: other N to time a scan at.
        lengths: L to time a scan at, with batch 1 and `size_by_length` states.
        step_sizes: N to time a training step at, with each scan.
        size_after: N after a cut.
    """

    model_type: str
    title: str
    implementations: tuple[str, ...]  # of the scan, in this package
    bases: tuple[str, ...]  # of a cut
    inputs: tuple[str, ...]  # of the scan, by name
    size_by_length: int
    reference: Callable[..., Tensor]  # the scan whose gradients all others are to give
    checked: Shape  # where they are compared, at any N
    of_transformers: dict[str, dict]  # scans of Transformers that train models here, with options of a configuration

    shape: Shape
    state_sizes: list[int]
    lengths: list[int]
    step_sizes: list[int]
    size_after: int

    def __init__(self, args: Arguments):
        self.args = args

    @abstractmethod
    def scans(self) -> dict[str, Callable[..., Tensor]]:
        """Return name → scan of the inputs; ours come first, the fastest before the others."""

    @abstractmethod
    def scan_inputs(self, shape: Shape) -> tuple[list[Tensor], Tensor]:
        """Return what a layer passes, in its memory layout, and a gradient for the output."""

    @abstractmethod
    def least_work(self, shape: Shape, dtype: torch.dtype) -> Work:
        """Return what a scan of inputs of this dtype has to do, forward and backward."""

    @abstractmethod
    def build(self, size: int, **options) -> PreTrainedModel:
        """Return a model of `size` states on the device; options are of its configuration."""

    @property
    def own_scans(self) -> list[str]:
        """Those of this package that serve on the device, the fastest first."""
        device = self.args.device
        names = [name for name in PREFERENCE[device] if name in self.implementations]
        return [name for name in names if scan_name(device, own=(name, "torch")) == name]

    @property
    def has_mamba_ssm(self) -> bool:
        """Whether kernels of mamba-ssm can serve on the device."""
        return kernel_in_force(self.args.device, model_type=self.model_type) == MAMBA_SSM

    @property
    def training_scans(self) -> list[str]:
        """Those that a model can be trained with, ours first."""
        return [*self.own_scans, *self.of_transformers, *[MAMBA_SSM] * self.has_mamba_ssm]

    def narrow(self, values: dict[str, Tensor], exact: tuple[str, ...]) -> list[Tensor]:
        """Return inputs on the device, with gradients to be, in the dtype of the arguments but for those named."""
        dtypes = [torch.float32 if name in exact else getattr(torch, self.args.dtype) for name in self.inputs]
        pairs = zip(self.inputs, dtypes, strict=True)
        return [values[name].to(self.args.device, dtype).requires_grad_() for name, dtype in pairs]
