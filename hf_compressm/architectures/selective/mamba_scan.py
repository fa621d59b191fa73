"""These functions put the scans of this package into Transformers' Mambas, and let an observer see a scan's arguments.

Transformers' `modeling_mamba` and its kin call functions of their own. These call kernels of the Hub where a model
asked for them, those of mamba-ssm and causal-conv1d where these packages are installed, else a reference in PyTorch.
`install_scan` puts ours in their place. Then `kernels.dispatch` decides what runs; CPU tensors never reach a CUDA
kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.integrations import hub_kernels
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.mamba import modeling_mamba
from transformers.models.zamba import modeling_zamba

from ...kernels.cpp_scan import step as cpp_step
from ...kernels.dispatch import FOREIGN, requested_scan, scan_name
from ...kernels.scan import selective_scan
from ...kernels.torch_scan import torch_transforms
from ...private_api import check_private_names
from .family import Observer
from .mamba_kernels import can_take_kernels, kernel_of, reference_of

MODULES = {  # by model type
    "mamba": modeling_mamba,
    "falcon_mamba": modeling_falcon_mamba,
    "jamba": modeling_jamba,
    "zamba": modeling_zamba,
}

# What install_scan replaced, by model type and name; empty when it is not installed.
_originals: dict[tuple[str, str], Callable] = {}
_observer: Observer | None = None


def install_scan() -> None:
    """Let every model with Mamba-1's scan in this process run this package's scan where no CUDA kernel serves.

    These are `transformers`' Mamba, FalconMamba, Jamba and Zamba. A kernel serves that came from the Hub
    (`use_kernels=True`) or with mamba-ssm; then the scan is left to it.

    It holds for the whole process until `uninstall_scan` is called; a second call changes nothing.

    Raises:
        ValueError: HF_COMPRESSM_SCAN names no scan, or this Transformers lacks functions that are to be replaced.
    """
    requested_scan()
    if _originals:
        return
    check_private_names(*(module.__name__ for module in MODULES.values()), hub_kernels.__name__)
    for model_type, module in MODULES.items():
        for name, stand_in in STAND_INS.items():
            if hasattr(module, name):  # a Zamba has no fused block
                replacement = stand_in(model_type, name)
                _originals[model_type, name] = getattr(module, name)
                setattr(module, name, replacement)


def uninstall_scan() -> None:
    """Put back what `install_scan` replaced, or change nothing where it was not called."""
    while _originals:
        (model_type, name), original = _originals.popitem()
        setattr(MODULES[model_type], name, original)


def scan_is_installed() -> bool:
    """Return whether `install_scan` is in force."""
    return bool(_originals)


@torch.compiler.assume_constant_result
def kernel_in_force(device_type: str, name: str = "mamba_selective_scan", model_type: str = "mamba") -> str | None:
    """Return whose kernel this function of a model has on this kind of device, "hub" or "mamba_ssm", or None."""
    return kernel_of(_original(model_type, name), device_type)


def reference_loop_would_run(device_type: str, model_type: str = "mamba") -> bool:
    """Return whether a model on this kind of device would train with Transformers' loop, quadratic in L."""
    return not scan_is_installed() and kernel_in_force(device_type, model_type=model_type) is None


def scan_in_force(device_type: str) -> str:
    """Return the name of the scan that a Mamba on this kind of device runs now, as a text for the user."""
    name = _serving("mamba", "mamba_selective_scan", device_type)
    if reference_loop_would_run(device_type):
        name = f"Transformers' loop (call install_scan() for '{name}')"
    elif not scan_is_installed():
        name = kernel_in_force(device_type)
    may_change = (
        device_type != "cpu" and name != "hub" and can_take_kernels(_original("mamba", "mamba_selective_scan"))
    )
    return f"{name}, or a kernel of the Hub for a model with use_kernels=True" if may_change else name


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
    """Let the observer run every scan of a Mamba in eval mode within this block, and so see what each is given."""
    global _observer
    with scan_installed():
        previous, _observer = _observer, observer
        try:
            yield
        finally:
            _observer = previous


def _scan(model_type: str, name: str) -> Callable:
    """Return what stands in for `mamba_selective_scan`, with its signature."""

    def scan(
        u, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **options
    ):
        if _observer is not None:
            y, last_state = _observer(u, dt, A, B, C, D, z, delta_bias, delta_softplus)
            return (y, last_state) if return_last_state else y
        if _serving(model_type, name, u.device.type) in FOREIGN:
            original = _originals[model_type, name]
            return original(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **options)
        return selective_scan(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state)

    return scan


def _fused_block(model_type: str, name: str) -> Callable:
    """Return what stands in for `mamba_inner_fn`: it returns None where the layer has to call the single functions."""

    def fused_block(xz, *args, **kwargs):
        if _serving(model_type, name, xz.device.type) not in FOREIGN:
            return None
        return _originals[model_type, name](xz, *args, **kwargs)

    return fused_block


def _state_update(model_type: str, name: str) -> Callable:
    """Return what stands in for `mamba_selective_state_update`, a step of generation, and has its signature."""
    others = _kernel_or_reference(model_type, name)

    def update(state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **options):
        expected = (*hidden_states.shape, A.shape[-1])
        if state.shape != expected:  # the C++ kernel would read past the end of a tensor
            raise ValueError(
                f"the cache holds states of shape {tuple(state.shape)}, a step of this layer needs {expected}, "
                "(batch, channels, N): it was filled for another batch or before a cut. Start with an empty cache."
            )
        by_kernel = scan_name(state.device.type, state.dtype) == "cpp" and state.is_contiguous()
        if by_kernel and not torch.is_grad_enabled() and not torch_transforms():
            return cpp_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
        bias = {"dt_bias": dt_bias, "dt_softplus": dt_softplus}
        return others(state, hidden_states, dt, A, B, C, D=D, z=z, **bias, **options)

    return update


def _kernel_or_reference(model_type: str, name: str) -> Callable:
    """Return what stands in for a function: its kernel where that can run, and else Transformers' loop."""
    original = _original(model_type, name)
    reference = reference_of(original)

    def dispatch(tensor, *args, **kwargs):
        function = reference if kernel_in_force(tensor.device.type, name, model_type) is None else original
        return function(tensor, *args, **kwargs)

    return dispatch


STAND_INS: dict[str, Callable[[str, str], Callable]] = {  # by the name of what they stand in for
    "mamba_selective_scan": _scan,
    "mamba_inner_fn": _fused_block,
    "mamba_selective_state_update": _state_update,
    "causal_conv1d_fn": _kernel_or_reference,
    "causal_conv1d_update": _kernel_or_reference,
}


@torch.compiler.assume_constant_result
def _serving(model_type: str, name: str, device_type: str) -> str:
    """Return the name of the scan that serves where a model calls this function on this kind of device."""
    return scan_name(device_type, other=kernel_in_force(device_type, name, model_type))


def _original(model_type: str, name: str) -> Callable:
    """Return the function of Transformers, whether the scan is installed or not."""
    return _originals.get((model_type, name)) or getattr(MODULES[model_type], name)
