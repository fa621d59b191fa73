"""Through the cuts on a GPU, in every precision; skipped where there is none."""

import importlib.util

import pytest
import torch
from conftest import build_trainer, losses_of, weights_of

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, uninstall_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PRECISIONS = {"float32": ({}, 1e-3), "bf16": ({"bf16": True}, 5e-2), "fp16": ({"fp16": True}, 5e-2)}


def train(folder, dataset, **options):
    callback = CompreSSMCallback(CompreSSMConfig(target_state_size=4), CompreSSMSchedule(end=0.5, events=2))
    trainer = build_trainer(folder, dataset, **options)
    callback.attach(trainer)
    trainer.train()
    assert trainer.model.config.state_size == 4
    return trainer


@pytest.mark.parametrize("scan", ["ours", "mamba-ssm"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_are_those_of_the_cpu(tmp_path, dataset, precision, scan):
    if scan == "mamba-ssm":
        if importlib.util.find_spec("mamba_ssm") is None:
            pytest.skip("mamba-ssm is not installed")
        uninstall_scan()  # Transformers then takes the fused path, which bypasses submodules
    options, tolerance = PRECISIONS[precision]
    on_gpu = train(tmp_path / "gpu", dataset, use_cpu=False, **options)
    on_cpu = train(tmp_path / "cpu", dataset)
    assert on_gpu.args.n_gpu == 1 and on_gpu.model.device.type == "cuda"
    expected = losses_of(on_cpu)
    assert losses_of(on_gpu) == pytest.approx(expected, rel=tolerance)
    assert all(torch.isfinite(weight).all() for weight in weights_of(on_gpu.model).values())


def test_a_compiled_run_goes_through_the_cuts(tmp_path, dataset):
    compiled = train(tmp_path / "compiled", dataset, use_cpu=False, bf16=True, torch_compile=True)
    eager = train(tmp_path / "eager", dataset, use_cpu=False, bf16=True)
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=2e-2)
