"""The scan inside the six models with Mamba-2's mixer: it gives what Transformers' own gives, and leaves no trace."""

from types import MethodType

import pytest
import torch
from balanced_models import CASES, build_cut, build_stock, cache_for, mixers_of, states_of, tokens
from conftest import recorded_operators
from torch import nn

from hf_compressm import env_report, install_scan, uninstall_scan
from hf_compressm.architectures import state_layers
from hf_compressm.architectures.installed_scan import kernel_in_force, scan_in_force, scan_is_installed
from hf_compressm.architectures.scalar_decay.mamba2_scan import MODULES, STAND_INS

BUILDERS = {"plain": lambda case: build_stock(case=case), "balanced": build_cut}
# Where the sizes of a test model do not matter, one family stands for all: their functions are the same text.
MAMBA2 = MODULES["mamba2"]


@pytest.fixture(autouse=True)
def uninstalled_scan():
    """Against conftest, which installs it: here each test says itself when the scan is installed."""
    uninstall_scan()
    yield
    uninstall_scan()


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def loss_and_gradients(model, mask):
    ids = tokens()
    model.zero_grad()
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients


def left_padding():
    return (torch.arange(19) >= torch.tensor([[0], [7]])).long()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-pad"])
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("case", CASES)
def test_a_model_gives_the_loss_and_gradients_of_transformers_own_scan(case, kind, padded):
    model, mask = BUILDERS[kind](case).train(), left_padding() if padded else None
    expected = loss_and_gradients(model, mask)
    install_scan()
    found = loss_and_gradients(model, mask)
    assert found.keys() == expected.keys() and any("A_log" in name for name in found)
    largest = max(value.abs().max() for name, value in expected.items() if name != "logits")
    for name, value in expected.items():
        tolerance = 1e-5 if name in ("logits", "loss") else 1e-4  # both round through all layers; seen 3.2e-5
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max() + 1e-7 * largest, name


@torch.no_grad()
def generated(model) -> list[torch.Tensor]:
    """Logits of a prefill, of a second piece and of single steps, and the states in the end."""
    ids, cache, logits, start = tokens(), cache_for(model), [], 0
    for length in (9, 1, 1, 1):
        logits.append(model(ids[:, start : start + length], **cache).logits)
        start += length
    return [torch.cat(logits, 1), *states_of(cache, model)]


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("case", CASES)
def test_cached_generation_equals_that_of_transformers_own_scan(case, kind):
    model = BUILDERS[kind](case)
    expected = generated(model)
    install_scan()
    for value, reference in zip(generated(model), expected, strict=True):
        assert_close(value, reference)


@torch.no_grad()
def test_a_model_in_bfloat16_stays_within_its_rounding():
    model = build_stock(case="mamba2").bfloat16()
    expected = model(tokens(), use_cache=False).logits
    install_scan()
    found = model(tokens(), use_cache=False).logits
    assert found.dtype == expected.dtype
    assert_close(found, expected, 0.05)


@pytest.mark.parametrize("model_type", MODULES)
def test_installing_replaces_five_functions_and_uninstalling_restores_them(model_type):
    module = MODULES[model_type]
    before = dict(vars(module))
    install_scan()
    installed = dict(vars(module))
    assert {name for name in installed if installed[name] is not before[name]} == set(STAND_INS)
    install_scan()
    assert all(getattr(module, name) is installed[name] for name in STAND_INS)
    uninstall_scan()
    assert not scan_is_installed() and all(getattr(module, name) is before[name] for name in STAND_INS)


# What runs


@pytest.mark.parametrize(("requested", "name"), [("", "cpp"), ("torch", "torch"), ("triton", "triton")])
def test_a_compiled_model_runs_the_operator_that_the_environment_names(monkeypatch, requested, name):
    monkeypatch.setenv("HF_COMPRESSM_SCAN", requested)
    assert env_report()["scan of Mamba-2 on cpu"] == f"Transformers' own (call install_scan() for '{name}')"
    install_scan()
    assert env_report()["scan of Mamba-2 on cpu"] == scan_in_force("cpu", "mamba2") == name
    operators = recorded_operators(build_stock(case="mamba2"), tokens())
    assert operators.count(f"hf_compressm.{name}_scalar_decay_scan.default") == 2


def test_export_takes_a_model_with_its_scan_at_any_length():
    install_scan()
    model = build_stock(case="mamba2")
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=4096)}, "use_cache": None}
    with torch.no_grad():
        inputs = {"input_ids": tokens(), "use_cache": False}
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
        longer = tokens(length=150)
        found = exported.module()(input_ids=longer, use_cache=False).logits
        assert_close(found, model(longer, use_cache=False).logits)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("hf_compressm.cpp_scalar_decay_scan.default") == 2


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_are_refused_as_transformers_refuses_them(name):
    """In the fused convolution and in the scan: ours would let a state run on into the next sequence."""
    install_scan()
    model, packed = build_stock(case="mamba2"), torch.zeros(2, 19, dtype=torch.int32)
    mixer = mixers_of(model)[0]
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        mixer(torch.randn(2, 19, 32), **{name: packed})
    x, B = torch.randn(2, 19, 4, 16), torch.randn(2, 19, 2, 8)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        MAMBA2.mamba2_chunk_scan(x, torch.rand(2, 19, 4), -torch.ones(4), B, B, chunk_size=8, **{name: packed})


@pytest.mark.parametrize("installed_first", [False, True])
def test_a_kernel_of_the_hub_serves_where_our_scan_would(monkeypatch, installed_first):
    class Function(nn.Module):
        """The function as the package `kernels` hands it to Transformers."""

        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    def of_the_hub(self, *args, **kwargs):
        raise RuntimeError("a kernel of the Hub")

    func, module = MAMBA2.mamba2_chunk_scan, Function()
    monkeypatch.setattr(MAMBA2, "mamba2_chunk_scan", module)
    if installed_first:
        install_scan()
        assert scan_in_force("cuda", "mamba2") == "triton, or a kernel of the Hub for a model with use_kernels=True"
    module.forward = MethodType(of_the_hub, module)
    install_scan()
    devices = ("cpu", "cuda", "xpu")
    assert [kernel_in_force(device, model_type="mamba2") for device in devices] == [None, "hub", "hub"]
    assert [scan_in_force(device, "mamba2") for device in devices] == ["cpp", "hub", "hub"]
    model = build_stock(case="mamba2")
    assert model(tokens(), use_cache=False).logits.isfinite().all()  # on a CPU ours serves
    with pytest.raises(RuntimeError, match="a kernel of the Hub"):
        model.to("meta")(tokens().to("meta"), use_cache=False)
    uninstall_scan()  # before monkeypatch puts the function back


# A step of generation


def step_inputs(batch=2, heads=4, head_dim=5, states=6, groups=2):
    x, dt = torch.randn(batch, heads, head_dim), torch.randn(batch, heads, 1).expand(-1, -1, head_dim)
    A, D, bias = -torch.rand(heads), torch.randn(heads), torch.randn(heads)
    B, C = torch.randn(2, batch, groups, states)
    A = A[:, None, None].expand(-1, head_dim, states)
    D, bias = (each[:, None].expand(-1, head_dim) for each in (D, bias))
    return {"hidden_states": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": bias, "dt_softplus": True}


@torch.no_grad()
@pytest.mark.parametrize("change", ["none", "gate", "a rate for each state", "a step for each channel", "no copy"])
def test_a_step_equals_transformers_own_and_overwrites_the_state(change):
    inputs, state = step_inputs(), torch.randn(2, 4, 5, 6)
    if change == "gate":
        inputs["z"] = torch.randn(2, 4, 5)
    if change == "a rate for each state":
        inputs["A"] = -torch.rand(4, 5, 6)
    if change == "a step for each channel":
        inputs["dt"] = torch.randn(2, 4, 5)
    if change == "no copy":
        state = torch.randn(2, 4, 6, 5).mT  # of a layout that the kernel does not take
    expected_state = state.clone()
    expected = MAMBA2.mamba2_selective_state_update(expected_state, **inputs)
    install_scan()
    y = MAMBA2.mamba2_selective_state_update(state, **inputs)
    assert_close(y, expected)
    assert_close(state, expected_state)


def test_a_step_leaves_gradients_to_pytorch():
    install_scan()
    inputs = step_inputs()
    y = MAMBA2.mamba2_selective_state_update(torch.randn(2, 4, 5, 6), **inputs | {"B": inputs["B"].requires_grad_()})
    assert torch.autograd.grad(y.sum(), inputs["B"])[0].abs().sum() > 0


@torch.no_grad()
def test_a_state_of_another_shape_is_refused_before_a_kernel_reads_past_its_end():
    install_scan()
    with pytest.raises(
        ValueError, match=r"states of shape \(1, 4, 5, 6\), a step .* needs \(2, 4, 5, 6\), \(batch, heads"
    ):
        MAMBA2.mamba2_selective_state_update(torch.randn(1, 4, 5, 6), **step_inputs())


# Observers


@torch.no_grad()
@pytest.mark.parametrize("installed", [False, True])
def test_an_observer_is_told_what_each_scan_is_given(installed):
    if installed:
        install_scan()
    model, seen = build_stock(case="mamba2"), []
    before = MAMBA2.mamba2_chunk_scan
    with state_layers(model).family.observed_scan(lambda inputs, y: seen.append((inputs, y))):
        logits = model(tokens(), use_cache=False).logits
    assert MAMBA2.mamba2_chunk_scan is before
    assert_close(logits, model(tokens(), use_cache=False).logits)
    assert len(seen) == 2 and [len(inputs) for inputs, _ in seen] == [5, 5]
    for (inputs, y), mixer in zip(seen, mixers_of(model), strict=True):
        assert y.shape == (2, 19, 64) and torch.equal(inputs.A, -mixer.A_log.exp())
        assert (inputs.time_step > 0).all() and inputs.B.shape == inputs.C.shape == (2, 19, 2, 16)
