"""Which scan serves, who may say so, and that compilers take it whole."""

import os

import pytest
import torch
from conftest import recorded_operators
from processes import run_program
from scan_reference import OPTIONAL, relative_error, require_gradients, scan_inputs, small_model, token_ids
from torch.library import opcheck

from hf_compressm import env_report, install_scan, uninstall_scan
from hf_compressm.architectures.installed_scan import scan_in_force
from hf_compressm.kernels import dispatch, selective_scan
from hf_compressm.kernels.dispatch import choose_scan, scan_name

IMPLEMENTATIONS = ["torch", "cpp", "triton"]


@pytest.mark.parametrize(
    ("requested", "name"), [(None, "cpp"), ("", "cpp"), ("cpp", "cpp"), ("torch", "torch"), ("triton", "triton")]
)
def test_the_environment_names_the_scan_of_a_cpu(monkeypatch, requested, name):
    if requested is None:
        monkeypatch.delenv("HF_COMPRESSM_SCAN", raising=False)
    else:
        monkeypatch.setenv("HF_COMPRESSM_SCAN", requested)
    assert scan_name("cpu") == scan_in_force("cpu") == env_report()["scan on cpu"] == name
    assert choose_scan("cpu", torch.float32)._name == f"{name}_scan"
    assert scan_name("cpu", torch.float64) == "torch"  # the only one that computes in it
    install_scan()
    graph = recorded_operators(small_model(), token_ids())
    assert graph.count(f"hf_compressm.{name}_scan.default") == 2


@pytest.mark.parametrize("requested", ["triton", "mamba_ssm", "hub"])
def test_a_scan_that_cannot_serve_a_device_leaves_it_to_the_next(monkeypatch, requested):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("HF_COMPRESSM_SCAN", requested)
    assert scan_name("cpu") == "cpp"
    assert scan_name("mps") == "torch"


@pytest.mark.parametrize("other", ["hub", "mamba_ssm"])
def test_on_cuda_the_kernel_that_a_layer_has_goes_first_and_triton_next(monkeypatch, other):
    assert scan_name("cuda") == "triton" and scan_name("cuda", other=other) == other
    for name in ("triton", "torch"):
        monkeypatch.setenv("HF_COMPRESSM_SCAN", name)
        assert scan_name("cuda", other=other) == name
    monkeypatch.setenv("HF_COMPRESSM_SCAN", other)
    assert scan_name("cuda", other=other) == other and scan_name("cuda") == "triton"


def test_an_unknown_name_is_refused_before_anything_is_installed(monkeypatch):
    uninstall_scan()
    monkeypatch.setenv("HF_COMPRESSM_SCAN", "fast")
    with pytest.raises(ValueError, match="HF_COMPRESSM_SCAN = 'fast'; allowed: torch, cpp, triton, mamba_ssm, hub"):
        install_scan()
    assert "Transformers' own" in env_report_of_a_process({"HF_COMPRESSM_SCAN": ""})


@pytest.mark.parametrize("name", ["fast", "mamba_ssm", "hub", "cpp"])
def test_an_implementation_that_cannot_compute_the_inputs_is_refused(name):
    with pytest.raises(ValueError, match=f"implementation = '{name}' does not compute on cpu in torch.float64"):
        selective_scan(**scan_inputs(), implementation=name)


def env_report_of_a_process(environment) -> str:
    code = "from hf_compressm import env_report; print(env_report()['scan on cpu'])"
    return run_program(code, **environment).stdout


WITHOUT_A_COMPILER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from scan_reference import reference_scan, relative_error, scan_inputs
from hf_compressm.kernels import selective_scan
inputs = scan_inputs(dtype=torch.float32)
for _ in range(3):
    assert relative_error(selective_scan(**inputs), reference_scan(**inputs)[0]) < 1e-5
print("works")
"""


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_scan_in_pytorch_serves_with_one_warning(tmp_path, compiler):
    environment = {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    run = run_program(WITHOUT_A_COMPILER, os.path.dirname(__file__), check=False, **environment)
    assert run.returncode == 0 and run.stdout == "works\n", run.stderr
    assert run.stderr.count("could not be compiled") == 1
    assert not list(tmp_path.rglob("*.so"))


def test_torch_asked_for_by_name_spares_the_compiler(tmp_path):
    environment = {"CXX": "false", "XDG_CACHE_HOME": str(tmp_path), "HF_COMPRESSM_SCAN": "torch"}
    run = run_program(WITHOUT_A_COMPILER, os.path.dirname(__file__), check=False, **environment)
    assert run.stdout == "works\n" and "compile" not in run.stderr


# Compilers


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [(), OPTIONAL], ids=["bare", "all-options"])
def test_a_scan_keeps_what_an_operator_promises(name, options):
    """Its schema, its fake kernels and its gradient, as torch checks them."""
    inputs = require_gradients(scan_inputs(1, 3, 2, 17, torch.float32, options))
    tensors = [inputs.get(key) for key in ("u", "time_step", "A", "B", "C", "D", "gate", "time_step_bias")]
    scan = choose_scan("cpu", torch.float32, name)
    opcheck(scan, (*tensors, inputs["softplus"], inputs.get("initial_state"), True))
    y, last_state, ungated, kept = scan(*tensors, inputs["softplus"], inputs.get("initial_state"), True)
    plain = [None if tensor is None else tensor.detach() for tensor in tensors]
    saved = (inputs["softplus"], ungated.detach(), kept.detach())
    backward = getattr(torch.ops.hf_compressm, f"{name}_scan_backward")
    opcheck(backward, (torch.randn_like(y), torch.randn_like(last_state), *plain, *saved))


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_export_takes_a_model_with_its_scan_at_any_length(monkeypatch, name):
    monkeypatch.setenv("HF_COMPRESSM_SCAN", name)
    model, ids = small_model().eval(), token_ids()
    length = {"input_ids": {1: torch.export.Dim("length", min=2, max=4096)}, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=length)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count(f"hf_compressm.{name}_scan.default") == 2
    longer = token_ids(length=50)
    with torch.no_grad():
        found = exported.module()(input_ids=longer, use_cache=False).logits
        assert relative_error(found, model(longer, use_cache=False).logits) < 1e-5


# The order of sums


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_neither_chance_nor_the_number_of_threads_changes_a_bit(name):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            inputs = require_gradients(scan_inputs(2, 150, 5, 40, torch.float32))
            y, last_state = selective_scan(**inputs, return_last_state=True, implementation=name)
            (y.square().sum() + last_state.sum()).backward()
            results.append([y, last_state, *(leaf.grad for leaf in inputs.values() if torch.is_tensor(leaf))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_kernels_are_named_in_one_place():
    assert set(dispatch.PREFERENCE) == {"cpu", "cuda"} and set(IMPLEMENTATIONS) < set(dispatch.NAMES)
