"""These functions put the scans of this package into the models of Transformers, and say what runs.

The models call functions of their own. These call kernels of the Hub where a model asked for them, those of mamba-ssm
and causal-conv1d where these packages are installed, else a reference in PyTorch. `install_scan` puts ours in their
place. Then `kernels.dispatch` decides what runs; CPU tensors never reach a CUDA kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.integrations import hub_kernels

from ..kernels.dispatch import requested_scan
from ..private_api import check_private_names
from .foreign_kernels import can_take_kernels
from .replaced_functions import (
    any_is_replaced,
    foreign_kernel,
    original_function,
    put_functions_back,
    replace_functions,
    serving_scan,
)
from .scalar_decay import mamba2_scan
from .selective import mamba_scan
from .selective.family import Observer

KINDS = (mamba_scan, mamba2_scan)
KIND_OF = {model_type: kind for kind in KINDS for model_type in kind.MODULES}


def install_scan() -> None:
    """Let every model with a scan of Mamba's kind in this process run this package's where no CUDA kernel serves.

    These are `transformers`' Mamba, FalconMamba, Jamba and Zamba, and Mamba-2, Bamba, Falcon-H1, GraniteMoeHybrid,
    Nemotron-H and Zamba2. A kernel serves that came from the Hub (`use_kernels=True`) or with mamba-ssm; then the scan
    is left to it.

    It holds for the whole process until `uninstall_scan` is called; a second call changes nothing.

    Raises:
        ValueError: HF_COMPRESSM_SCAN names no scan, or this Transformers lacks functions that are to be replaced.
    """
    requested_scan()
    if scan_is_installed():
        return
    modules = [module for kind in KINDS for module in kind.MODULES.values()]
    check_private_names(*(module.__name__ for module in modules), hub_kernels.__name__)
    for kind in KINDS:
        replace_functions(kind.MODULES.values(), kind.STAND_INS)
        for owner, stand_in in kind.STEPS.items():
            replace_functions([owner], {"forward": stand_in})


def uninstall_scan() -> None:
    """Put back what `install_scan` replaced, or change nothing where it was not called."""
    put_functions_back()


def scan_is_installed() -> bool:
    """Return whether `install_scan` is in force."""
    return any_is_replaced()


@contextmanager
def scan_installed() -> Iterator[None]:
    """Install the scan for a `with` block, and leave it as it was before afterwards."""
    was_installed = scan_is_installed()
    install_scan()
    try:
        yield
    finally:
        if not was_installed:
            uninstall_scan()


@contextmanager
def observed_scan(observer: Observer) -> Iterator[None]:
    """Let the observer run every scan of a Mamba-1 in eval mode within this block, and so see what each is given."""
    with scan_installed(), mamba_scan.observer_of_scans(observer):
        yield


@torch.compiler.assume_constant_result
def kernel_in_force(device_type: str, name: str | None = None, model_type: str = "mamba") -> str | None:
    """Return whose kernel a function of a model has on this kind of device, "hub" or "mamba_ssm", or None.

    Args:
        name: the function; by default the model's scan.
    """
    kind = KIND_OF[model_type]
    return foreign_kernel(kind.MODULES[model_type], name or kind.SCAN, device_type)


def reference_would_run(device_type: str, model_type: str = "mamba") -> bool:
    """Return whether a model on this kind of device would train with Transformers' own scan in PyTorch."""
    return not scan_is_installed() and kernel_in_force(device_type, model_type=model_type) is None


def scan_in_force(device_type: str, model_type: str = "mamba") -> str:
    """Return the name of the scan that such a model on this kind of device runs now, as a text for the user."""
    kind = KIND_OF[model_type]
    module = kind.MODULES[model_type]
    name = serving_scan(module, kind.SCAN, device_type, kind.OWN)
    if reference_would_run(device_type, model_type):
        name = f"Transformers' own (call install_scan() for '{name}')"
    elif not scan_is_installed():
        name = kernel_in_force(device_type, model_type=model_type)
    may_change = device_type != "cpu" and name != "hub" and can_take_kernels(original_function(module, kind.SCAN))
    return f"{name}, or a kernel of the Hub for a model with use_kernels=True" if may_change else name
