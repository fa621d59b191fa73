"""This is the one place that decides which scan serves a tensor.

It goes by the device and by what is there: on a GPU a kernel of the Hub or of mamba-ssm that the layer has, then
Triton; on a CPU the kernel that is compiled on first use; elsewhere PyTorch. `HF_COMPRESSM_SCAN` names one to be taken
wherever it can serve: torch, cpp, triton, mamba_ssm or hub.
"""

import os
from importlib.util import find_spec

import torch

from .contract import Scan
from .cpp_scalar_decay import scan as cpp_scalar_decay_scan
from .cpp_scan import is_available as cpp_kernel_is_available
from .cpp_scan import scan as cpp_scan
from .torch_scalar_decay import scan as torch_scalar_decay_scan
from .torch_scan import scan as torch_scan

VARIABLE = "HF_COMPRESSM_SCAN"
FOREIGN = ("hub", "mamba_ssm")  # reached through Transformers only
NAMES = ("torch", "cpp", "triton", *reversed(FOREIGN))
SCALAR_DECAY = ("torch", "cpp", "triton")  # what there is of the scan with scalar decay, beside kernels of others
PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}


@torch.compiler.assume_constant_result
def scan_name(
    device_type: str,
    dtype: torch.dtype = torch.float32,
    other: str | None = None,
    own: tuple[str, ...] = NAMES,
) -> str:
    """Return the implementation for this kind of device and dtype of the states: one of `NAMES`.

    Args:
        other: one of `FOREIGN`, where the layer that asks has a kernel of that kind for this device. It goes first,
            but after what the environment names.
        own: the implementations of this kind of scan in this package; by default those of the selective scan.

    Raises:
        ValueError: the environment names a scan that does not exist.
    """
    names = [*requested_scan(), other, *PREFERENCE.get(device_type, ()), "torch"]
    return next(
        name for name in names if name and (name == other or (name in own and _serves(name, device_type, dtype)))
    )


def compiled_kernel_serves(device_type: str) -> bool:
    """Return whether the kernel in C++ serves for what it has beside scans: convolutions, and steps of layers."""
    return scan_name(device_type, own=("torch", "cpp")) == "cpp"


def requested_scan() -> list[str]:
    """Return what the environment asks for: one name, or none."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in NAMES:
        raise ValueError(f"{VARIABLE} = {name!r}; allowed: {', '.join(NAMES)}.")
    return [name] if name else []


def choose_scan(device_type: str, dtype: torch.dtype, implementation: str | None = None) -> Scan:
    """Return our operator for this kind of device and dtype of the states, or the one that is asked for by name.

    Raises:
        ValueError: the one that is asked for does not exist, or cannot serve here.
    """
    name = _chosen(device_type, dtype, implementation, NAMES)
    if name == "triton":
        from .triton_scan import scan as triton_scan

        return triton_scan
    return cpp_scan if name == "cpp" else torch_scan


def choose_scalar_decay_scan(device_type: str, dtype: torch.dtype, implementation: str | None = None) -> Scan:
    """Return our operator of the scan with scalar decay, as `choose_scan` does for the selective scan.

    Raises:
        ValueError: the one that is asked for does not exist, or cannot serve here.
    """
    name = _chosen(device_type, dtype, implementation, SCALAR_DECAY)
    if name == "triton":
        from .triton_scalar_decay import scan as triton_scalar_decay_scan

        return triton_scalar_decay_scan
    return cpp_scalar_decay_scan if name == "cpp" else torch_scalar_decay_scan


def _chosen(device_type: str, dtype: torch.dtype, implementation: str | None, own: tuple[str, ...]) -> str:
    if implementation and (implementation not in own or not _serves(implementation, device_type, dtype)):
        raise ValueError(
            f"implementation = {implementation!r} does not compute on {device_type} in {dtype}; leave it out."
        )
    return implementation or scan_name(device_type, dtype, own=own)


def _serves(name: str, device_type: str, dtype: torch.dtype) -> bool:
    if name == "torch":
        return True
    if dtype != torch.float32 or name in FOREIGN:
        return False
    if name == "triton":
        interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        adds_in_any_order = not torch.are_deterministic_algorithms_enabled()
        return (device_type == "cuda" or interpreted) and adds_in_any_order and find_spec("triton") is not None
    return device_type == "cpu" and cpp_kernel_is_available()
