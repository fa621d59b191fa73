"""This file alone decides which implementation of the scan computes on a tensor.

It chooses by device from what is there: on CUDA mamba-ssm, then Triton; on a CPU the kernel that is compiled on first
use; else PyTorch. `HF_COMPRESSM_SCAN` names one to be taken wherever it can compute: torch, cpp, triton or mamba_ssm.
"""

import os
import sys
from importlib.util import find_spec

import torch

from .cpp_scan import is_available as cpp_kernel_is_available
from .cpp_scan import scan as cpp_scan
from .operators import Scan
from .torch_scan import scan as torch_scan

VARIABLE = "HF_COMPRESSM_SCAN"
NAMES = ("torch", "cpp", "triton", "mamba_ssm")
PREFERENCE = {"cuda": ("mamba_ssm", "triton", "torch"), "cpu": ("cpp", "torch")}


@torch.compiler.assume_constant_result
def scan_name(device_type: str, dtype: torch.dtype = torch.float32, own: bool = False) -> str:
    """Return the implementation for this kind of device and dtype of the states: one of `NAMES`.

    Args:
        own: whether to leave out mamba-ssm, which is reached through Transformers only.

    Raises:
        ValueError: the environment names a scan that does not exist.
    """
    names = [*requested_scan(), *PREFERENCE.get(device_type, ()), "torch"]
    return next(name for name in names if _serves(name, device_type, dtype) and not (own and name == "mamba_ssm"))


def requested_scan() -> list[str]:
    """Return what the environment asks for: one name, or none.

    Raises:
        ValueError: the environment names a scan that does not exist.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in NAMES:
        raise ValueError(f"{VARIABLE} = {name!r}; allowed: {', '.join(NAMES)}.")
    return [name] if name else []


def choose_scan(device_type: str, dtype: torch.dtype, implementation: str | None = None) -> Scan:
    """Return the operator for this kind of device and dtype of the states, or the one that is asked for by name.

    Raises:
        ValueError: that one does not exist, or cannot compute here.
    """
    name = implementation or scan_name(device_type, dtype, own=True)
    if implementation and (name not in NAMES or name == "mamba_ssm" or not _serves(name, device_type, dtype)):
        raise ValueError(f"implementation = {name!r} does not compute on {device_type} in {dtype}; leave it out.")
    if name == "triton":
        from .triton_scan import scan as triton_scan

        return triton_scan
    return cpp_scan if name == "cpp" else torch_scan


def mamba_ssm_serves(device_type: str) -> bool:
    """Return whether Transformers takes mamba-ssm: wherever it was imported, on CUDA tensors only."""
    return device_type == "cuda" and sys.modules.get("mamba_ssm") is not None


def _serves(name: str, device_type: str, dtype: torch.dtype) -> bool:
    if name == "torch":
        return True
    if dtype != torch.float32:
        return False
    if name == "mamba_ssm":
        return mamba_ssm_serves(device_type)
    if name == "triton":
        interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        adds_in_any_order = not torch.are_deterministic_algorithms_enabled()
        return (device_type == "cuda" or interpreted) and adds_in_any_order and find_spec("triton") is not None
    return device_type == "cpu" and cpp_kernel_is_available()
