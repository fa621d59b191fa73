"""Kernels in Triton compiled for a GPU that need not be there, in a process where Triton does not interpret."""

import os
import subprocess
import sys

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TARGET = GPUTarget("cuda", 90, 32)


def compiled(kernel, constants: dict, numbers: set[str], narrow: dict[str, str], divisible=(), **options):
    """Compile a kernel whose other arguments are pointers.

    Args:
        constants: argument → value.
        numbers: those that are integers.
        narrow: pointer → its type, where that is not fp32.
        divisible: numbers that 16 divides.
        options: of the compiler, such as `num_warps`.
    """
    types = {name: "i32" if name in numbers else f"*{narrow.get(name, 'fp32')}" for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in kernel.arg_names if types[name].startswith("*") or name in divisible]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}  # as torch's tensors are
    source = ASTSource(kernel, signature=types, constexprs=values, attrs=hints)
    return compile(source, target=TARGET, options=options)


def stack_bytes(kernel, folder) -> int:
    """Return how much memory a thread has for what its registers do not hold."""
    file = folder / f"{kernel.name}.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def run_compiler(program: str, folder, *arguments) -> str:
    """Run a program that imports this file, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    run = subprocess.run(command, env=environment, cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout
