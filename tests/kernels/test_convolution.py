"""The causal convolution in C++: it gives what float64 gives, at any size and layout, and is an operator of torch."""

import pytest
import torch
from scan_reference import relative_error
from torch.library import opcheck
from torch.nn import functional as F
from transformers.models.mamba import modeling_mamba

from hf_compressm import install_scan, uninstall_scan
from hf_compressm.architectures.foreign_kernels import reference_of
from hf_compressm.kernels import cpp_scan
from hf_compressm.kernels.cpp_convolution import _convolution, causal_convolution, causal_convolution_step

TRANSFORMERS = reference_of(modeling_mamba.causal_conv1d_fn)
STEP = reference_of(modeling_mamba.causal_conv1d_update)
SIZES = [(1, 5, 1, 4), (2, 33, 7, 3), (1, 16, 300, 4), (2, 270, 259, 2), (3, 513, 2, 4)]  # batch, D, L, K


@pytest.fixture(autouse=True)
def kernel():
    assert cpp_scan.is_available()


def inputs_of(batch, channels, length, width, layout="by position", bias=True, dtype=torch.float32):
    x = torch.randn(batch, channels, length)
    if layout == "by position":  # a part of a wider projection, as in a mixer
        x = torch.randn(batch, length, channels + 3)[..., 1:-2].transpose(1, 2)
    weight = torch.randn(channels, width)
    given = x.to(dtype), weight, torch.randn(channels) if bias else None
    return [None if value is None else value.requires_grad_() for value in given]


@pytest.mark.parametrize("layout", ["by channel", "by position"])
@pytest.mark.parametrize(("silu", "bias"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_equals_float64_forward_and_backward(sizes, silu, bias, layout):
    inputs = inputs_of(*sizes, layout, bias)
    exact = [None if value is None else value.detach().double().requires_grad_() for value in inputs]
    y, expected = causal_convolution(*inputs, silu), TRANSFORMERS(*exact, activation="silu" if silu else None)
    assert relative_error(y, expected) < 2e-6 and y.transpose(1, 2).is_contiguous()
    grad_y = torch.randn(y.shape)
    y.backward(grad_y)
    expected.backward(grad_y.double())
    for value, reference in zip(inputs, exact, strict=True):
        assert value is None or relative_error(value.grad, reference.grad) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32_and_rounded_once(dtype):
    narrow = inputs_of(2, 33, 40, 4, dtype=dtype)
    wide = [value.detach().float().requires_grad_() for value in narrow]
    y, expected = causal_convolution(*narrow, True), causal_convolution(*wide, True)
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    grad_y = torch.randn(y.shape).to(dtype)
    y.backward(grad_y)
    expected.backward(grad_y.float())
    assert torch.equal(narrow[0].grad, wide[0].grad.to(dtype)) and torch.equal(narrow[1].grad, wide[1].grad)


def test_it_gives_the_same_bits_with_any_number_of_threads():
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        inputs = inputs_of(3, 70, 600, 4)
        causal_convolution(*inputs, True).square().sum().backward()
        found.append([value.grad for value in inputs])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_it_keeps_what_an_operator_promises(bias):
    x, weight, offset = inputs_of(2, 5, 7, 4, bias=bias)
    opcheck(_convolution, (x.transpose(1, 2), weight, offset, True))


def test_a_second_derivative_is_refused():
    inputs = inputs_of(1, 3, 5, 4)
    (grad,) = torch.autograd.grad(causal_convolution(*inputs, True).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


def test_a_width_that_it_does_not_have_is_an_error():
    with pytest.raises(RuntimeError, match="the convolution is 5 positions wide; allowed: 2, 3, 4"):
        causal_convolution(torch.randn(1, 3, 9), torch.randn(3, 5))


def test_weights_of_other_channels_are_an_error():
    with pytest.raises(RuntimeError, match="the sizes do not fit"):
        causal_convolution(torch.randn(1, 7, 9), torch.randn(6, 4))
    with pytest.raises(RuntimeError, match="the sizes do not fit"):
        causal_convolution_step(torch.zeros(1, 7, 4), torch.randn(1, 7), torch.randn(6, 4), None, True)


@torch.no_grad()
@pytest.mark.parametrize(("width", "silu", "bias"), [(4, True, True), (3, False, True), (2, True, False)])
def test_steps_equal_the_whole_sequence(width, silu, bias):
    x, weight, offset = inputs_of(2, 19, 6, width, bias=bias)
    state = torch.zeros(2, 19, width)
    steps = [causal_convolution_step(state, x[..., t].contiguous(), weight, offset, silu) for t in range(6)]
    assert relative_error(torch.stack(steps, -1), causal_convolution(x, weight, offset, silu)) < 1e-6
    assert torch.equal(state, F.pad(x, (width, 0))[..., -width:])


# In the place of the functions of Transformers


@pytest.mark.parametrize(
    ("width", "activation", "dtype", "serves"),
    [
        (4, "silu", torch.float32, True),
        (4, None, torch.bfloat16, True),
        (5, "silu", torch.float32, False),
        (4, "gelu", torch.float32, False),
        (4, "silu", torch.float64, False),
    ],
)
def test_the_kernel_serves_where_it_can_and_transformers_own_elsewhere(width, activation, dtype, serves):
    x, weight, bias = (value.to(dtype) for value in inputs_of(2, 9, 8, width))
    expected = TRANSFORMERS(x, weight, bias, activation=activation)
    install_scan()
    try:
        y = modeling_mamba.causal_conv1d_fn(x, weight, bias, activation=activation)
    finally:
        uninstall_scan()
    assert y.dtype == dtype and relative_error(y, expected) < (0.02 if dtype == torch.bfloat16 else 1e-6)
    assert ("causal_convolution" in str(y.grad_fn.next_functions[0][0])) == serves


@torch.no_grad()
@pytest.mark.parametrize("change", ["none", "gelu", "several positions", "bfloat16", "no copy", "no bias"])
def test_a_step_in_place_of_transformers_own_equals_it(change):
    x, weight, bias = (value.detach() for value in inputs_of(2, 9, 3 if change == "several positions" else 1, 4))
    state, activation = torch.randn(2, 9, 4), "gelu" if change == "gelu" else "silu"
    if change == "bfloat16":
        x, weight, bias, state = (value.bfloat16() for value in (x, weight, bias, state))
    if change == "no copy":
        state = state.mT.contiguous().mT
    bias, expected_state = None if change == "no bias" else bias, state.clone()
    expected = STEP(x, expected_state, weight, bias, activation=activation)
    install_scan()
    try:
        y = modeling_mamba.causal_conv1d_update(x, state, weight, bias, activation=activation)
    finally:
        uninstall_scan()
    assert y.shape == expected.shape and relative_error(y, expected) < 1e-6 and torch.equal(state, expected_state)
