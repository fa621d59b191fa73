"""A model of several dtypes, as mamba_ssm keeps them, is exported with the function that it has."""

import pytest
import torch
from conftest import assert_identical, build_model, weights_of
from safetensors.torch import load_file

from hf_compressm.storage.export import export_bf16, export_mamba_ssm, export_sharded, export_uniform
from hf_compressm.storage.loading import load_language_model
from hf_compressm.storage.mamba_ssm_format import read_mamba_ssm, write_mamba_ssm

IN_FLOAT32 = (".A_log", ".D")  # which mamba_ssm keeps in float32 beside weights in bf16


def mixed_model(others: torch.dtype, of_state: torch.dtype):
    """A model whose A_log and D have another dtype than all other weights, and use its precision."""
    model = build_model().to(others)
    for name, parameter in model.named_parameters():
        if name.endswith(IN_FLOAT32):
            noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.data = (parameter.float() + noise).to(of_state)
    return model


@pytest.fixture(params=[(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=["bf16", "float32"])
def source(request, tmp_path):
    write_mamba_ssm(mixed_model(*request.param), tmp_path / "source")
    return tmp_path / "source"


def test_the_dtype_of_every_weight_survives_an_export_that_can_hold_it(source, tmp_path):
    exported = export_mamba_ssm(source, tmp_path / "target")
    assert exported.difference == 0
    before, after = weights_of(read_mamba_ssm(source)), weights_of(read_mamba_ssm(tmp_path / "target"))
    assert_identical(after, before)
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }


@pytest.mark.parametrize(
    "export",
    [export_uniform, lambda source, target: export_sharded(source, target, "50KB")],
    ids=["uniform", "sharded"],
)
def test_where_one_dtype_is_all_that_a_reader_takes_it_is_the_widest(source, tmp_path, export):
    """Transformers gives all weights the dtype of the config: a narrower one would be another model."""
    exported = export(source, tmp_path / "target")
    assert exported.difference == 0
    written = load_language_model(tmp_path / "target")
    assert written.dtype is torch.float32
    assert_identical(weights_of(written), weights_of(read_mamba_ssm(source).float()))


def test_bf16_is_still_all_in_bf16(source, tmp_path):
    export_bf16(source, tmp_path / "target")
    (weights,) = (tmp_path / "target").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}


def test_double_precision_is_not_lost(tmp_path):
    model = build_model().double()
    model.backbone.embeddings.weight.data += 1e-12
    model.save_pretrained(tmp_path / "source")
    export_uniform(tmp_path / "source", tmp_path / "target")
    assert_identical(
        weights_of(load_language_model(tmp_path / "target")), weights_of(load_language_model(tmp_path / "source"))
    )
