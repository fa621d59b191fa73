"""The scan with scalar decay in Triton, interpreted on this CPU, and compiled for a GPU that need not be there.

The slow runs of test_scalar_decay_scan.py hold it to all that is asked of such a scan; here is what is most at risk.
"""

from functools import partial

import pytest
import torch
from gpu_compilation import run_compiler
from scalar_decay_reference import OPTIONAL, in_float64, outputs_and_gradients, reference_scan, scan_inputs

from hf_compressm.kernels.scalar_decay_scan import scalar_decay_scan

triton_scan = partial(scalar_decay_scan, implementation="triton")
COMPILE = """
import sys
from pathlib import Path
from gpu_compilation import compiled, stack_bytes
from hf_compressm.kernels import triton_scalar_decay as kernels

folder, dtype, head_dim, states, *absent = sys.argv[1:]
tile = kernels._tile(int(head_dim), int(states))
options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
numbers = {"length", "heads", "head_dim", "states"}  # a 1, as of groups mostly, Triton takes as a constant
divisible = [name for name, size in (("head_dim", head_dim), ("states", states)) if int(size) % 16 == 0]
inputs, maps = dict.fromkeys(("x", "B", "C", "of_x", "of_B", "of_C"), dtype), {"maps": dtype}
first = {"first_state": None} if "initial_state" in absent else {}
skip = {"D": None} if "D" in absent else {}
for kernel, narrow, constants in (
    (kernels._pass_states, maps | {"values": dtype}, first | {"backward": False}),
    (kernels._outputs, inputs, skip),
    (kernels._pass_states, maps, {"backward": True}),
    (kernels._input_gradients, inputs, skip),
    (kernels._map_gradients, inputs, {}),
):
    found = compiled(kernel, tile | constants | {"groups": 1}, numbers, narrow, divisible, **options)
    print(found.metadata.shared, stack_bytes(found, Path(folder)))
"""
SLOW = [
    pytest.param(dtype, 64, states, absent, marks=pytest.mark.slow)
    for states in (16, 50, 64, 128, 256)
    for dtype, absent in (("bf16", ()), ("fp32", ("D", "initial_state")))
]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((1, 1, 1, 1, 1, 1), ()), ((2, 67, 4, 3, 5, 2), OPTIONAL), ((1, 65, 2, 33, 17, 1), ())],
    ids=str,
)
def test_odd_shapes_equal_the_recurrence_forward_and_backward(sizes, options):
    """One block or two of each size: of batch, L, heads, p, N and G."""
    inputs = scan_inputs(*sizes, dtype=torch.float32, options=options)
    found = outputs_and_gradients(triton_scan, inputs)
    for name, value in outputs_and_gradients(reference_scan, in_float64(inputs)).items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).abs().max() <= 2e-6 * value.abs().max(), name


def test_what_lies_between_two_extreme_steps_keeps_its_digits():
    inputs = scan_inputs(1, 70, 2, 3, 4, 1, torch.float32, ())
    inputs["time_step"][:, ::9] *= 1e3
    inputs["time_step"][:, 4::9] = 0
    inputs["x"][:, ::9] /= 1e3
    inputs["A"][:] = torch.tensor([-1, -1e4])
    found = outputs_and_gradients(triton_scan, inputs)
    for name, value in outputs_and_gradients(reference_scan, in_float64(inputs)).items():
        scale = value.abs().max()
        if name in ("A", "time_step"):  # cancelling sums would spoil the small ones
            scale = value.abs().clamp(min=1e-3 * scale)
        assert ((found[name] - value).abs() / scale).max() < 1e-5, name


def test_an_infinite_rate_forgets_at_once_and_spoils_nothing_beyond_the_end():
    inputs = scan_inputs(1, 3, 2, 3, 4, 1, torch.float32, ()) | {"A": torch.full((2,), -torch.inf)}
    found, expected = (scan(**inputs, return_last_state=True) for scan in (triton_scan, reference_scan))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "head_dim", "states", "absent"), [("bf16", 16, 12, ()), *SLOW])
def test_the_kernels_compile_for_a_gpu_and_fit_into_it(tmp_path, dtype, head_dim, states, absent):
    """Into the shared memory of any, and nearly into registers: a larger tile would spill tenfold."""
    lines = run_compiler(COMPILE, tmp_path, tmp_path, dtype, head_dim, states, *absent).splitlines()
    assert len(lines) == 5
    for shared, stack in (map(int, line.split()) for line in lines):
        assert shared <= 48 * 1024 and stack <= 512
