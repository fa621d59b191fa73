"""Kernels of the Hub and of mamba-ssm keep their place: what serves is seen in what the layers hold."""

import os
import subprocess
import sys
from types import MethodType

import pytest
from scan_reference import small_model, token_ids
from test_scan_in_models import CPU_MODEL_BESIDE_CUDA_KERNELS, CUDA_ONLY_PACKAGES
from torch import nn
from transformers.models.mamba import modeling_mamba

from hf_compressm import env_report, install_scan, uninstall_scan
from hf_compressm.architectures.foreign_kernels import reference_of
from hf_compressm.architectures.installed_scan import kernel_in_force, reference_would_run, scan_in_force

FUNCTIONS = ("mamba_selective_scan", "mamba_inner_fn")
DEVICES = ("cpu", "cuda", "xpu")


def module_of(func) -> nn.Module:
    """A function as the package `kernels` hands it to Transformers."""

    class Func(nn.Module):
        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    return Func()


def of_the_hub(self, *args, **kwargs):
    raise RuntimeError("a kernel of the Hub")


@pytest.fixture
def modules(monkeypatch) -> list[nn.Module]:
    uninstall_scan()
    found = [module_of(getattr(modeling_mamba, name)) for name in FUNCTIONS]
    for name, module in zip(FUNCTIONS, found, strict=True):
        monkeypatch.setattr(modeling_mamba, name, module)
    yield found
    uninstall_scan()  # before monkeypatch puts the functions back


def kernelize(modules) -> None:
    """What `kernels.kernelize` leaves behind: for all layers of the process, since they share the module."""
    for module in modules:
        module.forward = MethodType(of_the_hub, module)


@pytest.mark.parametrize("installed_first", [False, True])
def test_a_kernel_of_the_hub_serves_where_our_scan_would(modules, installed_first):
    assert [kernel_in_force(device) for device in DEVICES] == [None] * 3
    if installed_first:
        install_scan()
        assert scan_in_force("cuda") == "triton, or a kernel of the Hub for a model with use_kernels=True"
        assert scan_in_force("cpu") == "cpp"
    kernelize(modules)
    assert [kernel_in_force(device) for device in DEVICES] == [None, "hub", "hub"]
    assert [reference_would_run(device) for device in DEVICES] == [not installed_first, False, False]
    install_scan()
    assert [scan_in_force(device) for device in DEVICES] == ["cpp", "hub", "hub"]
    model, ids = small_model(), token_ids()
    assert model(ids, use_cache=False).logits.isfinite().all()  # on a CPU ours serves
    for training in (True, False):
        with pytest.raises(RuntimeError, match="a kernel of the Hub"):
            model.to("meta").train(training)(ids.to("meta"), use_cache=False)


@pytest.mark.parametrize(("name", "served"), [("triton", "triton"), ("torch", "torch"), ("hub", "hub")])
def test_the_environment_may_ask_for_another(modules, monkeypatch, name, served):
    kernelize(modules)
    monkeypatch.setenv("HF_COMPRESSM_SCAN", name)
    install_scan()
    assert scan_in_force("cuda").split(",")[0] == served
    assert env_report()["kernels"]


def test_a_kernel_that_falls_back_leaves_the_scan_to_us(modules):
    kernelize(modules)
    for module in modules:
        module.forward = MethodType(type(module).forward, module)
    install_scan()
    assert kernel_in_force("cuda") is None
    logits = small_model().to("meta")(token_ids().to("meta"), use_cache=False).logits
    assert logits.shape == (3, 21, 61)


def test_the_reference_is_the_function_of_the_source(modules):
    assert reference_of(modules[0]).__code__.co_filename == modeling_mamba.__file__
    assert not hasattr(reference_of(modules[0]), "__wrapped__")


WITH_KERNELS = """
import transformers.utils.import_utils as imports
imports.is_kernels_available = lambda *versions: True  # whatever release of `kernels` is installed
"""
LOCAL_KERNEL = {
    "metadata.json": """{"name": "local-scan", "id": "_local_scan_1", "version": 1, "license": "Apache-2.0",
                        "python-depends": [], "backend": {"type": "cpu"}}""",
    "__init__.py": "from . import layers",
    "layers.py": """
from torch import nn

class selective_scan_fn(nn.Module):
    def forward(self, hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                return_last_state=False, use_mambapy=False, use_associative_scan=False, **kwargs):
        raise RuntimeError("a kernel of the Hub")
""",
}
MODEL_WITH_A_LOCAL_KERNEL = """
import sys
from pathlib import Path
import torch
from kernels import KernelizeFallback, LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from transformers import MambaConfig, MambaForCausalLM
from hf_compressm import install_scan
from hf_compressm.architectures.installed_scan import kernel_in_force, scan_in_force

model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=7)).eval()
ids = torch.randint(61, (3, 11))
if sys.argv[2] == "first":
    install_scan()
repository = LocalLayerRepository(repo_path=Path(sys.argv[1]), layer_name="selective_scan_fn")
with use_kernel_mapping({"selective_scan_fn": {"xpu": {Mode.INFERENCE: repository}}}):
    kernelize(model, mode=Mode.INFERENCE, device="xpu", use_fallback=KernelizeFallback.ALL)
install_scan()
assert [scan_in_force(device) for device in ("cpu", "cuda", "xpu")] == ["cpp", "hub", "hub"]
assert kernel_in_force("xpu", "mamba_inner_fn") is None
with torch.no_grad():
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (3, 14)
    try:
        model.to("meta")(ids.to("meta"), use_cache=False)
    except RuntimeError as error:
        assert "a kernel of the Hub" in str(error)
        print("works")
"""


def run(code: str, folder, *arguments) -> None:
    search_path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", WITH_KERNELS + code, *arguments]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": search_path}, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith("works\n"), result.stderr


def write(folder, files: dict[str, str]) -> None:
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["first", "later"])
def test_a_real_local_kernel_serves_where_our_scan_would(tmp_path, installed):
    pytest.importorskip("kernels")
    write(tmp_path / "build" / "torch-universal", LOCAL_KERNEL)
    run(MODEL_WITH_A_LOCAL_KERNEL, tmp_path / "nothing", str(tmp_path), installed)


@pytest.mark.slow
def test_beside_kernels_too_a_cuda_only_mamba_ssm_does_not_break_a_cpu_model(tmp_path):
    pytest.importorskip("kernels")
    write(tmp_path, CUDA_ONLY_PACKAGES)
    run(CPU_MODEL_BESIDE_CUDA_KERNELS, tmp_path)
