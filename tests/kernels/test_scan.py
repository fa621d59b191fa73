"""The selective scan against the recurrence written out naively."""

from functools import partial

import pytest
import torch
from scan_reference import OPTIONAL, reference_scan, relative_error, require_gradients, scan_inputs

from hf_compressm import uninstall_scan
from hf_compressm.kernels import selective_scan


@pytest.fixture(autouse=True)
def uninstalled_scan():
    """Against conftest, which installs it: here each test says itself when the scan is installed."""
    uninstall_scan()
    yield
    uninstall_scan()


@pytest.fixture(params=["torch", "cpp", "triton"])
def implementation(request):
    return request.param


@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
@pytest.mark.parametrize("length", [1, 2, 9, 37])
@pytest.mark.parametrize("state_size", [1, 3, 17])
@pytest.mark.parametrize("channels", [1, 5, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_output_and_last_state_equal_the_recurrence(batch, channels, state_size, length, options):
    inputs = scan_inputs(batch, channels, state_size, length, options=options)
    y, last_state = selective_scan(**inputs, return_last_state=True)
    expected_y, expected_state = reference_scan(**inputs)
    assert y.shape == expected_y.shape and last_state.shape == expected_state.shape
    assert relative_error(y, expected_y) < 1e-12
    assert relative_error(last_state, expected_state) < 1e-12


@pytest.mark.parametrize("option", OPTIONAL)
def test_each_option_alone_equals_the_recurrence(option):
    inputs = scan_inputs(options=(option,))
    assert relative_error(selective_scan(**inputs), reference_scan(**inputs)[0]) < 1e-12


def test_a_sequence_in_two_parts_equals_the_whole():
    inputs = scan_inputs(length=37)
    whole, whole_state = selective_scan(**inputs, return_last_state=True)
    over_time = ("u", "time_step", "B", "C", "gate")
    first = inputs | {name: inputs[name][..., :11] for name in over_time}
    second = inputs | {name: inputs[name][..., 11:] for name in over_time}
    y1, state = selective_scan(**first, return_last_state=True)
    y2, state = selective_scan(**(second | {"initial_state": state}), return_last_state=True)
    assert relative_error(torch.cat([y1, y2], -1), whole) < 1e-12
    assert relative_error(state, whole_state) < 1e-12


@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
@pytest.mark.parametrize("length", [1, 10])
def test_gradients_of_output_and_last_state_equal_finite_differences(length, options):
    inputs = require_gradients(scan_inputs(3, 2, 3, length, options=options))
    names = [name for name, value in inputs.items() if torch.is_tensor(value)]

    def scan(*tensors):
        return selective_scan(
            **dict(zip(names, tensors, strict=True)), softplus=inputs["softplus"], return_last_state=True
        )

    assert torch.autograd.gradcheck(scan, [inputs[name] for name in names])


@pytest.mark.parametrize("loss_of", ["output", "last_state", "both"])
@pytest.mark.parametrize("length", [1, 9, 37, 150])
def test_float32_gradients_equal_autograd_through_the_loop(implementation, length, loss_of):
    inputs = scan_inputs(1 if length > 100 else 3, length=length, dtype=torch.float32)
    gradients = []
    for scan in (partial(selective_scan, implementation=implementation), reference_scan):
        leaves = require_gradients(inputs)
        y, last_state = scan(**leaves, return_last_state=True)
        weight = torch.linspace(-1, 2, y.numel()).view_as(y)
        loss = (loss_of != "last_state") * (y * weight).sum() + (loss_of != "output") * last_state.square().sum()
        loss.backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items() if torch.is_tensor(leaf)})
    ours, expected = gradients
    for name in expected:
        if expected[name].any():
            assert relative_error(ours[name], expected[name]) < 1e-5, name
        else:  # C, D and the gate, where the loss is of the last state
            assert not ours[name].any(), name


def test_bfloat16_inputs_give_bfloat16_output_from_float32_states(implementation):
    inputs = require_gradients(scan_inputs(1, length=150, dtype=torch.bfloat16))
    y, last_state = selective_scan(**inputs, return_last_state=True, implementation=implementation)
    assert y.dtype == torch.bfloat16 and last_state.dtype == torch.float32

    exact = {name: value.detach().double() if torch.is_tensor(value) else value for name, value in inputs.items()}
    expected_y, expected_state = reference_scan(**exact)
    assert relative_error(last_state, expected_state) < 1e-5
    scale = expected_y.abs().max().item()
    last_rounding = 2**-7 if implementation == "triton" else 2**-8  # Triton's interpreter cuts the bits off
    torch.testing.assert_close(y.double(), expected_y, rtol=last_rounding, atol=1e-5 * scale)

    (y.float().sum() + last_state.sum()).backward()
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in inputs.values() if torch.is_tensor(leaf))


def test_autocast_changes_nothing(implementation):
    results = []
    for enabled in (False, True):
        inputs = require_gradients(scan_inputs(1, dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, last_state = selective_scan(**inputs, return_last_state=True, implementation=implementation)
            (y.sum() + last_state.sum()).backward()
        results.append([y, last_state, *(leaf.grad for leaf in inputs.values() if torch.is_tensor(leaf))])
    for plain, in_autocast in zip(*results, strict=True):
        torch.testing.assert_close(in_autocast, plain, rtol=1e-6, atol=1e-6 * plain.abs().max().item())


@pytest.mark.parametrize("name", ["time_step", "A", "B", "C", *OPTIONAL])
def test_a_wrong_shape_is_refused_by_name(name):
    inputs = scan_inputs(3, 5, 7, 9)
    inputs[name] = inputs[name][:1] if name in ("A", "initial_state") else inputs[name][..., :1]
    with pytest.raises(ValueError, match=rf"\b{name} has shape"):
        selective_scan(**inputs)


def saved_states(scan, length, channels=5, state_size=33):
    """How many numbers in (…, D, N) autograd keeps for the backward pass."""
    inputs = require_gradients(scan_inputs(1, channels, state_size, length, torch.float32, options=()))
    saved = []

    def pack(tensor):
        if tensor.dim() > 2 and set(tensor.shape[-2:]) == {channels, state_size}:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(**inputs)
    return sum(saved)


def test_one_state_in_sixteen_is_kept_for_the_backward_pass(implementation):
    scan = partial(selective_scan, implementation=implementation)
    assert saved_states(scan, 256) == 256 // 16 * 5 * 33
    assert saved_states(reference_scan, 256) / saved_states(reference_scan, 16) > 15  # the count itself works
