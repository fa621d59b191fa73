"""The scans in Triton on a GPU, against the recurrence in float64; skipped where there is none.

TRITON_INTERPRET=0 python -m pytest tests/kernels/test_gpu_scans.py
"""

import pytest
import scalar_decay_reference as scalar_decay
import scan_reference as selective
import torch

from hf_compressm.kernels import selective_scan
from hf_compressm.kernels.scalar_decay_scan import scalar_decay_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STATES = (1, 9, 16, 64, 128, 256)


def on_gpu(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: value.to("cuda", dtype) if torch.is_tensor(value) else value for name, value in inputs.items()}


def assert_scan_equals(scan, reference, inputs: dict, tolerance: float) -> None:
    """Outputs, last states and all gradients are those of the reference, by their largest entry."""
    found = scalar_decay.outputs_and_gradients(scan, on_gpu(inputs, torch.float32))
    for name, value in scalar_decay.outputs_and_gradients(reference, on_gpu(inputs, torch.float64)).items():
        assert torch.isfinite(found[name]).all(), name
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("options", [(), scalar_decay.OPTIONAL], ids=["bare", "all-options"])
@pytest.mark.parametrize("state_size", STATES)
def test_a_scan_with_scalar_decay(state_size, options):
    inputs = scalar_decay.scan_inputs(2, 200, 4, 64, state_size, 2, options=options)

    def scan(**given):
        return scalar_decay_scan(**given, implementation="triton")

    assert_scan_equals(scan, scalar_decay.reference_scan, inputs, 1e-5)


@pytest.mark.parametrize("options", [(), selective.OPTIONAL], ids=["bare", "all-options"])
@pytest.mark.parametrize("state_size", STATES)
def test_a_selective_scan(state_size, options):
    inputs = selective.scan_inputs(2, 70, state_size, 200, options=options)

    def scan(**given):
        return selective_scan(**given, implementation="triton")

    assert_scan_equals(scan, selective.reference_scan, inputs, 1e-5)


def test_the_same_bits_come_every_time():
    inputs = on_gpu(scalar_decay.scan_inputs(2, 300, 4, 64, 64, 1), torch.float32)

    def scan(**given):
        return scalar_decay_scan(**given, implementation="triton")

    first, second = (scalar_decay.outputs_and_gradients(scan, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
