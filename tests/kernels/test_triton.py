"""The scan in Triton, interpreted on this CPU, and compiled for a GPU that need not be there."""

import os
import subprocess
import sys

import pytest
import torch
from scan_reference import OPTIONAL, reference_scan, relative_error, require_gradients, scan_inputs

from hf_compressm.kernels import selective_scan
from hf_compressm.kernels.dispatch import scan_name

COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hf_compressm.kernels import triton_scan

OPTIONAL = {"D", "bias", "gate", "initial_state", "ungated"}
NUMBERS = {"length", "channels"}


def compiled(kernel, narrow, state_size, without, target, **constants):
    tile = triton_scan._tile(state_size)
    warps = tile.pop("num_warps")
    constants |= tile | {"states": state_size} | dict.fromkeys(OPTIONAL & without & set(kernel.arg_names))
    types = {name: "i32" if name in NUMBERS else "*fp32" for name in kernel.arg_names if name not in constants}
    types |= {name: f"*{narrow}" for name in ("u", "time_step", "B", "C", "gate", "y", "grad_y") if name in types}
    types |= dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in kernel.arg_names if types[name].startswith("*") or name == "channels"]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}  # as torch's tensors are
    source = ASTSource(kernel, signature=types, constexprs=values, attrs=hints)
    return compile(source, target=target, options={"num_warps": warps})


narrow, state_size, without = sys.argv[1], int(sys.argv[2]), OPTIONAL & set(sys.argv[3:])
target = GPUTarget("cuda", 90, 32)
forward = compiled(triton_scan._scan_forward, narrow, state_size, without, target, softplus=True, keep=True)
backward = compiled(triton_scan._scan_backward, narrow, state_size, without, target, softplus=True)
print(len(forward.asm["cubin"]), len(backward.asm["cubin"]))
"""
SLOW = [
    pytest.param(narrow, state_size, without, marks=pytest.mark.slow)
    for state_size in (1, 16, 64, 128, 256)
    for narrow, without in (("bf16", ()), ("fp32", ("D", "bias", "gate", "initial_state", "ungated")))
]


@pytest.mark.parametrize(
    ("batch", "channels", "state_size", "length"), [(1, 5, 3, 1), (2, 7, 17, 37), (1, 33, 4, 16), (1, 40, 1, 33)]
)
@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
def test_odd_shapes_equal_the_recurrence_forward_and_backward(batch, channels, state_size, length, options):
    exact = require_gradients(scan_inputs(batch, channels, state_size, length, options=options))
    inputs = require_gradients({n: v.detach().float() if torch.is_tensor(v) else v for n, v in exact.items()})
    outputs = selective_scan(**inputs, return_last_state=True, implementation="triton")
    expected = reference_scan(**exact)
    sum(value.square().sum() for value in outputs).backward()
    sum(value.square().sum() for value in expected).backward()
    for found, value in zip(outputs, expected, strict=True):
        assert relative_error(found, value) < 1e-5
    for name, value in exact.items():
        if torch.is_tensor(value):
            largest = value.grad.abs().max().clamp_min(1e-3)  # at one position A has no gradient at all
            assert (inputs[name].grad - value.grad).abs().max() < 1e-5 * largest, name


def test_where_torch_is_to_be_deterministic_another_scan_serves():
    torch.use_deterministic_algorithms(True)
    try:
        assert (scan_name("cuda"), scan_name("cpu")) == ("torch", "cpp")
    finally:
        torch.use_deterministic_algorithms(False)
    assert scan_name("cuda") == "triton"


@pytest.mark.parametrize(("narrow", "state_size", "without"), [("bf16", 12, ()), *SLOW])
def test_the_kernels_compile_for_a_gpu(tmp_path, narrow, state_size, without):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, narrow, str(state_size), *without]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(int(size) > 1000 for size in run.stdout.split())
