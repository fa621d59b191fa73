"""What the scan makes of unusual requests: other derivatives, empty and non-finite inputs, other dtypes."""

import pytest
import torch
from scan_reference import (
    OPTIONAL,
    reference_scan,
    relative_error,
    require_gradients,
    scan_inputs,
    small_model,
    token_ids,
)
from torch.autograd import forward_ad
from torch.func import functional_call

from hf_compressm import install_scan, uninstall_scan
from hf_compressm.kernels import selective_scan

IDS = token_ids(length=7)
NAN = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFC00001 - 2**32, -1]).to(torch.int32).view(torch.float32)


@pytest.fixture(params=["torch", "cpp", "triton"])
def implementation(request):
    return request.param


# Derivatives


def log_likelihood(parameters, model, compiled=False):
    model = torch.compile(model, backend="eager") if compiled else model
    logits = functional_call(model, parameters, (IDS,), {"use_cache": False}).logits
    return logits.log_softmax(-1)[..., 0].mean()


def forward_derivative(model, parameters, **options):
    tangents = {name: torch.linspace(-1, 1, p.numel()).view_as(p) for name, p in parameters.items()}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in parameters.items()}
        return forward_ad.unpack_dual(log_likelihood(duals, model, **options)).tangent


def token_derivative(model, parameters):
    """Of a step of generation, by the scale of all parameters."""

    def logits(scale):
        scaled = {name: scale * p for name, p in parameters.items()}
        prefix = functional_call(model, scaled, (IDS[:, :5],), {"use_cache": True})
        cache = "cache" if "cache" in prefix else "cache_params"
        step = functional_call(model, scaled, (IDS[:, 5:6],), {cache: prefix[cache], "use_cache": True})
        return step.logits.square().mean()

    with torch.no_grad():
        return torch.func.jvp(logits, (torch.ones(()),), (torch.ones(()),))[1]


def scaled(model, parameters):
    return lambda scale: log_likelihood({name: scale * p for name, p in parameters.items()}, model)


DERIVATIVES = {
    "forward": forward_derivative,
    "forward, compiled": lambda model, p: forward_derivative(model, p, compiled=True),
    "of a step of generation": token_derivative,
    "jvp": lambda model, p: torch.func.jvp(scaled(model, p), (torch.ones(()),), (torch.ones(()),))[1],
    "grad": lambda model, p: torch.func.grad(scaled(model, p))(torch.ones(())),
    "hessian": lambda model, p: torch.func.hessian(scaled(model, p))(torch.ones(())),
    "grad of vmap": lambda model, p: torch.func.grad(lambda x: torch.func.vmap(scaled(model, p))(x).sum())(
        torch.ones(2)
    ),
    "vmap": lambda model, p: torch.func.vmap(scaled(model, p))(torch.tensor([1.0, 1.1])),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_of_other_kinds_are_those_of_transformers_own_loop(derivative):
    model = small_model().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    uninstall_scan()
    expected = DERIVATIVES[derivative](model, parameters)
    install_scan()
    torch._dynamo.reset()
    assert expected.abs().min() > 1e-4
    assert relative_error(DERIVATIVES[derivative](model, parameters), expected) < 1e-3


def test_the_plain_loop_of_transforms_is_the_recurrence():
    inputs = scan_inputs()
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}

    def scan(tensors):
        return selective_scan(**tensors, softplus=True, return_last_state=True)

    found, tangents = torch.func.jvp(scan, (tensors,), (tensors,))
    expected, expected_tangents = torch.func.jvp(lambda x: reference_scan(**x, softplus=True), (tensors,), (tensors,))
    for value, reference in zip((*found, *tangents), (*expected, *expected_tangents), strict=True):
        assert relative_error(value, reference) < 1e-12


@pytest.mark.parametrize("named", [False, True], ids=["backward", "grad of named inputs"])
def test_a_second_derivative_is_refused_with_the_remedy(implementation, named):
    inputs = require_gradients(scan_inputs(1, 1, 1, 3, torch.float32))
    y = selective_scan(**inputs, implementation=implementation)
    (gradient,) = torch.autograd.grad(y.sum(), inputs["u"], create_graph=True)
    loss = gradient.square().sum() + inputs["u"].square().sum()
    with pytest.raises(RuntimeError, match=r"call hf_compressm\.uninstall_scan\(\)"):
        torch.autograd.grad(loss, inputs["u"]) if named else loss.backward()


# Nothing to compute


@pytest.mark.parametrize("empty", ["batch", "channels", "state_size", "length"])
@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
def test_an_empty_axis_gives_empty_results(implementation, empty, options):
    sizes = {"batch": 2, "channels": 3, "state_size": 4, "length": 5} | {empty: 0}
    inputs = require_gradients(scan_inputs(**sizes, dtype=torch.float32, options=options))
    y, last_state = selective_scan(**inputs, return_last_state=True, implementation=implementation)
    (y.sum() + last_state.square().sum()).backward()
    batch, channels, state_size, length = sizes.values()
    assert y.shape == (batch, channels, length) and last_state.shape == (batch, channels, state_size)
    for name, value in inputs.items():
        if torch.is_tensor(value):
            assert value.grad.shape == value.shape and value.grad.isfinite().all(), name
    if empty == "length" and options:
        assert torch.equal(last_state, inputs["initial_state"])
        assert torch.equal(inputs["initial_state"].grad, 2 * last_state)
    if empty == "state_size":
        skip = inputs["u"] * inputs["D"][:, None] * torch.nn.functional.silu(inputs["gate"]) if options else 0 * y
        torch.testing.assert_close(y, skip)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_takes_an_empty_batch_as_with_transformers_own_loop(training):
    gradients = []
    for install in (uninstall_scan, install_scan):
        install()
        model = small_model().train(training)
        logits = model(torch.zeros(0, 5, dtype=torch.long)).logits
        logits.sum().backward()
        assert logits.shape == (0, 5, 61)
        gradients.append([None if p.grad is None else p.grad.sum().item() for p in model.parameters()])
    assert gradients[0] == gradients[1]


# Numbers that are none


@pytest.mark.parametrize("name", ["u", "time_step", "A", "B", "C", "gate"])
@pytest.mark.parametrize("implementation", ["cpp", "triton"])
def test_a_nan_reaches_what_it_reaches_in_pytorch(name, implementation):
    inputs = scan_inputs(1, 5, 3, 9, torch.float32)
    for value in NAN[: None if implementation == "cpp" else 1]:  # Triton's interpreter is slow
        inputs[name][(1, 2) if name == "A" else (0, 1, 4)] = value
        results = []
        for each in ("torch", implementation):
            leaves = require_gradients(inputs)
            y, last_state = selective_scan(**leaves, return_last_state=True, implementation=each)
            (y.sum() + last_state.sum()).backward()
            gradients = {n: leaf.grad for n, leaf in leaves.items() if torch.is_tensor(leaf)}
            results.append({n: x.isnan() for n, x in ({"y": y, "last_state": last_state} | gradients).items()})
        expected, found = results
        assert expected["y"].any()
        for n in expected:
            assert found[n][expected[n]].all(), f"{n} dropped {value.view(torch.int32)}"
            assert implementation == "triton" or torch.equal(found[n], expected[n]), n


def test_a_decay_rate_of_minus_infinity_forgets_everything(implementation):
    inputs = scan_inputs(2, 5, 3, 21, torch.float32, options=())
    inputs["A"][1] = -torch.inf
    y, last_state = selective_scan(**inputs, return_last_state=True, implementation=implementation)
    expected = reference_scan(**inputs)
    torch.testing.assert_close((y, last_state), expected, rtol=1e-5, atol=1e-5)
    assert last_state.isfinite().all()


# Gradients that cancellation or an end could spoil


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("length", [11, 16])
def test_the_bias_gathers_the_gradients_of_the_time_steps_and_no_others(implementation, length, softplus):
    inputs = scan_inputs(1, 3, 4, length, torch.float32) | {"softplus": softplus}
    inputs |= {name: inputs[name].abs() for name in ("time_step", "time_step_bias")}  # Δ > 0 without softplus, too
    inputs = require_gradients(inputs)
    _, last_state = selective_scan(**inputs, return_last_state=True, implementation=implementation)
    last_state.sum().backward()
    expected = inputs["time_step"].grad.sum((0, 2))
    torch.testing.assert_close(inputs["time_step_bias"].grad, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_tiny_time_step_keeps_its_digits(implementation):
    inputs = scan_inputs(1, 2, 3, 9, torch.float32)
    inputs["time_step"] -= 20  # Δ = 2e-9
    exact = require_gradients({n: v.double() if torch.is_tensor(v) else v for n, v in inputs.items()})
    leaves = require_gradients(inputs)
    selective_scan(**leaves, implementation=implementation).sum().backward()
    reference_scan(**exact)[0].sum().backward()
    assert relative_error(leaves["time_step"].grad, exact["time_step"].grad) < 1e-5


# Dtypes


@pytest.mark.parametrize("name", ["u", "A", "gate", "time_step_bias"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_a_dtype_that_is_not_of_real_numbers_is_refused_by_name(name, dtype):
    inputs = scan_inputs(dtype=torch.float32)
    inputs[name] = inputs[name].to(dtype)
    with pytest.raises(ValueError, match=rf"^{name} has dtype {dtype}; allowed: torch\.float16, .*torch\.float64"):
        selective_scan(**inputs)


@pytest.mark.parametrize("name", ["u", "A", "D", "gate", "time_step_bias", "initial_state"])
def test_any_input_in_float64_makes_the_states_float64(name):
    inputs = scan_inputs(dtype=torch.float32)
    inputs[name] = inputs[name].double()
    y, last_state = selective_scan(**inputs, return_last_state=True)
    exact = {n: v.double() if torch.is_tensor(v) else v for n, v in inputs.items()}
    assert y.dtype == inputs["u"].dtype and last_state.dtype == torch.float64
    assert relative_error(last_state, reference_scan(**exact)[1]) < 1e-12
