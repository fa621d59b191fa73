"""The scan with scalar decay against the recurrence written out naively: values, gradients, unusual requests."""

from functools import partial

import pytest
import torch
from scalar_decay_reference import OPTIONAL, in_float64, outputs_and_gradients, reference_scan, scan_inputs
from scan_reference import relative_error, require_gradients
from torch.library import opcheck

from hf_compressm.kernels import cpp_scan
from hf_compressm.kernels.cpp_scalar_decay import step
from hf_compressm.kernels.scalar_decay_scan import scalar_decay_scan

IMPLEMENTATIONS = ["torch", "cpp", pytest.param("triton", marks=pytest.mark.slow)]  # interpreted, in minutes
SIZES = [  # batch, L, heads, p, N, G
    (1, 1, 1, 1, 1, 1),
    (3, 5, 4, 3, 7, 2),
    (2, 64, 6, 5, 17, 3),
    (2, 65, 2, 16, 16, 1),
    (1, 200, 4, 40, 33, 2),
    (2, 31, 8, 20, 100, 8),
    (1, 129, 1, 64, 128, 1),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_equal_those_of_the_recurrence_in_float64(sizes, options):
    inputs = scan_inputs(*sizes, options=options)
    found, expected = (outputs_and_gradients(scan, inputs) for scan in (scalar_decay_scan, reference_scan))
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32_values_and_gradients_equal_those_of_float64(implementation, sizes, options):
    inputs = scan_inputs(*sizes, dtype=torch.float32, options=options)
    found = outputs_and_gradients(partial(scalar_decay_scan, implementation=implementation), inputs)
    expected = outputs_and_gradients(reference_scan, in_float64(inputs))
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).abs().max() <= 2e-5 * value.abs().max(), name


@pytest.mark.parametrize("option", OPTIONAL)
def test_each_option_alone_equals_the_recurrence(implementation, option):
    inputs = scan_inputs(dtype=torch.float32, options=(option,))
    found = outputs_and_gradients(partial(scalar_decay_scan, implementation=implementation), inputs)
    for name, value in outputs_and_gradients(reference_scan, in_float64(inputs)).items():
        assert relative_error(found[name], value) < 2e-5, name


def test_a_sequence_in_two_parts_equals_the_whole(implementation):
    inputs = scan_inputs(length=100, dtype=torch.float32)
    scan = partial(scalar_decay_scan, implementation=implementation, return_last_state=True)
    whole, whole_state = scan(**inputs)
    over_time = ("x", "time_step", "B", "C")
    first, second = (
        inputs | {name: inputs[name][:, part] for name in over_time} for part in (slice(37), slice(37, None))
    )
    y1, state = scan(**first)
    y2, state = scan(**(second | {"initial_state": state}))
    assert relative_error(torch.cat([y1, y2], 1), whole) < 1e-5
    assert relative_error(state, whole_state) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_of_any_strides_are_computed_in_float32(implementation, dtype):
    inputs = scan_inputs(1, dtype=dtype)
    for name in ("x", "time_step", "B", "C"):  # as a convolution leaves them: neighbours are positions
        inputs[name] = inputs[name].transpose(1, -1).contiguous().transpose(1, -1)
    found = outputs_and_gradients(partial(scalar_decay_scan, implementation=implementation), inputs)
    expected = outputs_and_gradients(reference_scan, in_float64(inputs))
    for name, value in expected.items():
        is_output = name in ("y", "last_state")
        assert found[name].dtype == (torch.float32 if is_output else dtype)
        last_rounding = 2e-5 if is_output else torch.finfo(dtype).eps
        assert relative_error(found[name], value) < last_rounding, name


# Extremes


@pytest.mark.parametrize("steps", [1e-6, 1e3, 1e30], ids="{:.0e}".format)
@pytest.mark.parametrize("rate", [1e-4, 16.0, 1e4], ids="{:.0e}".format)
def test_extreme_steps_and_rates_keep_their_digits(implementation, steps, rate):
    """One position in nine is extreme: what lies between two such is still exact."""
    inputs = scan_inputs(1, 130, 2, 3, 4, 1, torch.float32, ())
    inputs["time_step"][:, ::9] *= steps
    inputs["x"][:, ::9] /= max(1, steps)
    inputs["A"][1] = -rate
    found = outputs_and_gradients(partial(scalar_decay_scan, implementation=implementation), inputs)
    expected = outputs_and_gradients(reference_scan, in_float64(inputs))
    for name, value in expected.items():
        assert found[name].isfinite().all(), name
        scale = value.abs().max()
        if name in ("A", "time_step"):  # cancelling sums would spoil the small ones
            scale = value.abs().clamp(min=1e-3 * scale)
        assert ((found[name] - value).abs() / scale).max() < 1e-4, name


def test_an_infinite_rate_forgets_at_once(implementation):
    inputs = scan_inputs(1, 70, 2, 3, 4, 1, torch.float32, ())
    inputs["A"][:] = -torch.inf
    y, last_state = scalar_decay_scan(**inputs, return_last_state=True, implementation=implementation)
    last = {name: v[:, -1:] if name in ("x", "time_step", "B", "C") else v for name, v in inputs.items()}
    expected_y, expected_state = reference_scan(**last)
    torch.testing.assert_close((y[:, -1:], last_state), (expected_y, expected_state))


@pytest.mark.parametrize("name", ["x", "time_step", "A", "B", "C", "initial_state"])
def test_a_nan_does_not_vanish(implementation, name):
    inputs = scan_inputs(1, 70, 2, 3, 4, 1, torch.float32)
    inputs[name].view(-1)[0] = torch.nan
    y, last_state = scalar_decay_scan(**inputs, return_last_state=True, implementation=implementation)
    assert y[0, 0].isnan().any()
    assert (name == "C") or last_state.isnan().any()


@pytest.mark.parametrize("empty", ["batch", "length", "heads", "head_dim", "state_size"])
def test_an_empty_axis_gives_empty_results(implementation, empty):
    sizes = {"batch": 2, "length": 5, "heads": 4, "head_dim": 3, "state_size": 4, "groups": 2} | {empty: 0}
    inputs = scan_inputs(**sizes, dtype=torch.float32)
    found = outputs_and_gradients(partial(scalar_decay_scan, implementation=implementation), inputs)
    assert found["y"].shape == inputs["x"].shape and found["last_state"].shape == inputs["initial_state"].shape
    if empty == "length":
        assert torch.equal(found["last_state"], inputs["initial_state"])
    if empty == "state_size":
        assert torch.equal(found["y"], inputs["D"][:, None] * inputs["x"])


# What else is asked of an operator


@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
def test_a_scan_keeps_what_an_operator_promises(implementation, options):
    """Its schema, its fake kernels and its gradient, as torch checks them."""
    inputs = require_gradients(scan_inputs(2, 67, 4, 3, 5, 2, torch.float32, options))
    tensors = [inputs.get(key) for key in ("x", "time_step", "A", "B", "C", "D")]
    scan = getattr(torch.ops.hf_compressm, f"{implementation}_scalar_decay_scan")
    opcheck(scan, (*tensors, inputs.get("initial_state"), True))
    y, last_state, kept = scan(*tensors, inputs.get("initial_state"), True)
    plain = [None if tensor is None else tensor.detach() for tensor in tensors]
    backward = getattr(torch.ops.hf_compressm, f"{implementation}_scalar_decay_scan_backward")
    opcheck(backward, (torch.randn_like(y), torch.randn_like(last_state), *plain, kept.detach()))


def test_a_second_derivative_is_refused_with_the_remedy(implementation):
    inputs = require_gradients(scan_inputs(1, 3, 2, 1, 1, 1, torch.float32))
    y = scalar_decay_scan(**inputs, implementation=implementation)
    (gradient,) = torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"call hf_compressm\.uninstall_scan\(\)"):
        gradient.square().sum().backward()


def test_in_transforms_there_is_every_derivative():
    inputs = scan_inputs(1, 66, 2, 2, 3, 1)
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    others = {name: value for name, value in inputs.items() if not torch.is_tensor(value)}

    def second_derivative(scan, scale):
        def loss(factor):
            y, last_state = scan(**{n: factor * v for n, v in tensors.items()}, **others, return_last_state=True)
            return y.square().sum() + last_state.sum()

        return torch.func.hessian(loss)(scale), torch.func.vmap(torch.func.grad(loss))(scale.repeat(2))

    at = torch.ones((), dtype=torch.float64)
    found, expected = second_derivative(scalar_decay_scan, at), second_derivative(reference_scan, at)
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) < 1e-10


def test_autocast_changes_nothing(implementation):
    inputs = scan_inputs(1, dtype=torch.float32)
    scan = partial(scalar_decay_scan, implementation=implementation)
    plain = outputs_and_gradients(scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = outputs_and_gradients(scan, inputs)
    assert all(torch.equal(in_autocast[name], value) for name, value in plain.items())


def test_neither_chance_nor_the_number_of_threads_changes_a_bit(implementation):
    threads, results = torch.get_num_threads(), []
    inputs = scan_inputs(2, 150, 8, 20, 40, 2, torch.float32)
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(partial(scalar_decay_scan, implementation=implementation), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_one_state_in_sixty_four_is_kept_for_the_backward_pass(implementation):
    inputs = require_gradients(scan_inputs(1, 256, 4, 5, 33, 1, torch.float32, ()))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        scalar_decay_scan(**inputs, implementation=implementation)
    given = {value.data_ptr() for value in inputs.values() if torch.is_tensor(value)}
    kept = [each for each in saved if each.data_ptr() not in given]
    assert sum(each.numel() for each in kept) == 256 // 64 * 4 * 5 * 33


@pytest.mark.parametrize("name", ["time_step", "A", "B", "C", *OPTIONAL])
def test_a_wrong_shape_or_dtype_is_refused_by_name(name):
    inputs = scan_inputs()
    with pytest.raises(ValueError, match=rf"^(x has shape .* and )?{name} (has shape )?\("):
        scalar_decay_scan(**(inputs | {name: inputs[name][:1, ..., None]}))
    with pytest.raises(ValueError, match=f"^{name} has dtype torch.int64; allowed: torch.float16"):
        scalar_decay_scan(**(inputs | {name: inputs[name].long()}))


def test_what_cannot_compute_the_inputs_is_refused():
    for name in ("fast", "triton", "mamba_ssm"):
        with pytest.raises(ValueError, match=f"implementation = '{name}' does not compute on cpu in torch.float64"):
            scalar_decay_scan(**scan_inputs(), implementation=name)
    with pytest.raises(ValueError, match="6 heads and B 4 groups of them; allowed: a number that divides 6"):
        scalar_decay_scan(**(scan_inputs() | {"B": torch.ones(2, 70, 4, 9), "C": torch.ones(2, 70, 4, 9)}))


# A step of generation


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_size", [1, 3, 12, 31, 128])
@pytest.mark.parametrize("options", [(), ("D", "time_step_bias")], ids=["bare", "all-options"])
def test_a_step_equals_the_recurrence(state_size, options, dtype):
    inputs = scan_inputs(3, 1, 6, 5, state_size, 2, dtype, (*options, "initial_state")) | {"time_step_limit": None}
    expected, expected_state = reference_scan(**in_float64(inputs))
    state = inputs["initial_state"].float()
    over_time = {name: inputs[name][:, 0] for name in ("x", "time_step", "B", "C")}
    names = ("x", "time_step", "A", "B", "C", "D", "time_step_bias")
    assert cpp_scan.is_available()
    y = step(state, *map((inputs | over_time).get, names), inputs["softplus"])
    assert y.dtype == dtype and y.shape == (3, 6, 5)
    assert relative_error(state, expected_state) < 1e-6
    assert relative_error(y, expected[:, 0]) < (1e-6 if dtype == torch.float32 else 2**-8)


def test_a_step_keeps_what_an_operator_promises():
    assert cpp_scan.is_available()
    inputs = scan_inputs(2, 1, 6, 5, 9, 2, torch.float32)
    x, time_step, B, C = (inputs[name][:, 0] for name in ("x", "time_step", "B", "C"))
    given = (inputs["initial_state"], x, time_step, inputs["A"], B, C, inputs["D"], None, True)
    opcheck(torch.ops.hf_compressm_kernel.scalar_decay_step, given)
    with pytest.raises(RuntimeError, match="the sizes do not fit: state"):
        step(inputs["initial_state"][:1], *given[1:])
