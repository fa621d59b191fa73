"""The scan in Triton, interpreted on this CPU, and compiled for a GPU that need not be there."""

import pytest
import torch
from gpu_compilation import run_compiler
from scan_reference import OPTIONAL, reference_scan, relative_error, require_gradients, scan_inputs

from hf_compressm.kernels import selective_scan
from hf_compressm.kernels.dispatch import scan_name

COMPILE = """
import sys
from gpu_compilation import compiled
from hf_compressm.kernels import triton_scan

dtype, states, *absent = sys.argv[1:]
tile = triton_scan._tile(int(states))
warps, constants = tile.pop("num_warps"), {"states": int(states), "softplus": True}
narrow = dict.fromkeys(("u", "time_step", "B", "C", "gate", "y", "grad_y"), dtype)
for kernel, others in ((triton_scan._scan_forward, {"keep": True}), (triton_scan._scan_backward, {})):
    given = tile | constants | others | {name: None for name in absent if name in kernel.arg_names}
    found = compiled(kernel, given, {"length", "channels"}, narrow, ["channels"], num_warps=warps)
    print(len(found.asm["cubin"]))
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
    sizes = run_compiler(COMPILE, tmp_path, narrow, state_size, *without).split()
    assert len(sizes) == 2 and all(int(size) > 1000 for size in sizes)
