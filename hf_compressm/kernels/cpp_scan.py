"""A kernel in C++, the folder `cpp`, computes the scans on a CPU; it is compiled on first use and kept.

It needs GCC. Where that is missing or fails, one warning says so and the scan in PyTorch serves. The compiled kernel
lies in `$XDG_CACHE_HOME/hf_compressm`, under a name made from its sources, torch and this processor.
"""

import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from .operators import define_scan

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpp"
SOURCE = SOURCES / "scan.cpp"  # includes the others
STEPS = {  # operators that overwrite states → which argument the result is like
    "step": 1,
    "scalar_decay_step": 1,
    "causal_convolution_step": 1,
    "selective_mixer_step": 0,
    "scalar_decay_mixer_step": 0,
}
FLAGS = "-std=c++20 -O3 -march=native -fopenmp -fPIC -shared -w".split()


@functools.cache
def is_available() -> bool:
    """Return whether the kernel is there; the first call compiles it."""
    try:
        library = _library()
        if not library.exists():
            logger.warning(f"hf_compressm compiles its scan for this processor, once (about half a minute): {library}")
            _compile(library)
        torch.ops.load_library(str(library))
        for name, like in STEPS.items():
            torch.library.register_fake(f"hf_compressm_kernel::{name}", lambda *args, like=like: args[like].clone())
    except Exception as error:
        lines = [line for line in (getattr(error, "stderr", None) or str(error)).splitlines() if line.strip()]
        reason = next((line for line in lines if "error:" in line), next(iter(lines), type(error).__name__))
        logger.warning(
            f"The scan of hf_compressm could not be compiled ({reason}); the slower one in PyTorch serves. "
            "Install GCC 12 or newer, or set HF_COMPRESSM_SCAN=torch to be spared this."
        )
        return False
    return True


def forward(u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep):
    """Implement the contract in `operators`."""
    return torch.ops.hf_compressm_kernel.forward(
        u, time_step, A, B, C, D, gate, time_step_bias, softplus, initial_state, keep
    )


def backward(grad_y, grad_last_state, u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept):
    """Implement the contract in `operators`."""
    return torch.ops.hf_compressm_kernel.backward(
        grad_y, grad_last_state.contiguous(), u, time_step, A, B, C, D, gate, time_step_bias, softplus, ungated, kept
    )


def step(state, u, time_step, A, B, C, D, gate, time_step_bias, softplus):
    """Take a step of the recurrence: overwrite the state, (batch, D, N), and return y, (batch, D), without gradients.

    u, time_step and gate are (batch, D), B and C (batch, N), in any dtype; the state is float32 and contiguous.
    """
    return torch.ops.hf_compressm_kernel.step(state, u, time_step, A, B, C, D, gate, time_step_bias, softplus)


def mixer_step(hidden, conv_state, state, norm, in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj):
    """Take a step of a whole mixer of Mamba-1: overwrite the states, and return its output, (batch, 1, hidden size).

    Args:
        hidden: its input, (batch, 1, hidden size); it and all others are float32 and contiguous.
        conv_state: the last inputs of the convolution, (batch, D, K).
        state: (batch, D, N).
        norm: weight and ε of an RMS norm before the mixer, whose output is then added to `hidden`; or None and 0.
        in_proj: weight and bias, as those of all layers; a bias may be None.
        x_proj: only a weight.
    """
    weights = *norm, *in_proj, *conv1d, x_proj, *dt_proj, A_log, D, *out_proj
    return torch.ops.hf_compressm_kernel.selective_mixer_step.default(hidden, conv_state, state, *weights)


def _library() -> Path:
    """Return where the kernel for these sources, torch and processor lies, or will lie."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    sources = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    parts = [*sources, torch.__version__, platform.machine(), *FLAGS, *processor, *_compiler()]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hf_compressm" / f"cpp_scan_{name}.so"


def _compiler() -> list[str]:
    return [get_cxx_compiler(), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def _compile(library: Path) -> None:
    """Compile aside and rename, so that processes that start together do not wait for each other."""
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in include_paths()]
    # Not OpenMP's: torch brings its own, and two of them fight for the cores.
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        aside = Path(folder) / library.name
        command = [*_compiler(), *FLAGS, *includes, str(SOURCE), *libraries, "-o", str(aside)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        aside.rename(library)


scan = define_scan("cpp", forward, backward)
