"""Mamba-2 in the format of mamba_ssm: the same bits there and back; hybrids and balanced states are refused."""

import json
import re

import pytest
import torch
from conftest import assert_identical
from scalar_decay_models import build_bamba, build_mamba2
from transformers import Mamba2Config, Mamba2ForCausalLM

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.console.cli import main
from hf_compressm.storage.export import export_mamba_ssm, export_uniform
from hf_compressm.storage.loading import load_language_model
from hf_compressm.storage.mamba_ssm_format import read_mamba_ssm, write_mamba_ssm

PUBLISHED = {  # state-spaces/mamba2-130m, smaller: the layers are all default
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 37,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def random_model(dtype=torch.float32, **changes) -> Mamba2ForCausalLM:
    """A model in which no tensor has the value that it was initialised with."""
    model = build_mamba2(**({"vocab_size": 40} | changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(torch.arange(24).view(2, 12)).logits


@pytest.fixture
def published(tmp_path):
    """A checkpoint as it is published: a padded vocabulary, and nothing said that is a default."""
    sizes = {"vocab_size": 48, "state_size": 128, "head_dim": 64, "num_heads": 1, "n_groups": 1}
    model = random_model(tie_word_embeddings=True, **sizes)
    write_mamba_ssm(model, tmp_path / "published")
    (tmp_path / "published" / "config.json").write_text(json.dumps(PUBLISHED))
    return tmp_path / "published", model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "state_size": 5, "conv_kernel": 3, "chunk_size": 8},
        {"vocab_size": 37, "use_bias": True, "use_conv_bias": False, "residual_in_fp32": False},
        {"time_step_limit": (0.01, 0.5), "n_groups": 4, "num_heads": 8, "head_dim": 8},
        {"dtype": torch.bfloat16},
    ],
)
def test_there_and_back_every_bit_is_the_same(tmp_path, changes):
    model = random_model(**changes)
    write_mamba_ssm(model, tmp_path)
    back = read_mamba_ssm(tmp_path)
    assert type(back) is Mamba2ForCausalLM and not back.training
    assert_identical(model.state_dict(), back.state_dict())
    assert torch.equal(logits_of(model), logits_of(back))
    names = "state_size num_heads head_dim n_groups conv_kernel chunk_size use_bias use_conv_bias tie_word_embeddings"
    assert all(getattr(back.config, name) == getattr(model.config, name) for name in names.split())
    assert list(back.config.time_step_limit) == list(model.config.time_step_limit)


def test_the_files_are_what_mamba_ssm_reads(tmp_path):
    write_mamba_ssm(random_model(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["ssm_cfg"] == {
        "layer": "Mamba2",
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "headdim": 16,
        "ngroups": 2,
        "rmsnorm": True,
        "norm_before_gate": False,
        "dt_limit": [0.0, float("inf")],
        "conv_bias": True,
        "bias": False,
        "chunk_size": 16,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in torch.load(tmp_path / "pytorch_model.bin").items()}
    mixer = {name.removeprefix("backbone.layers.1.mixer."): shapes[name] for name in shapes if ".1.mixer." in name}
    assert mixer == {
        "in_proj.weight": (64 + 64 + 2 * 2 * 16 + 4, 32),  # z, x, B, C, Δ
        "conv1d.weight": (64 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": (64 + 2 * 2 * 16,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }
    rest = {name for name in shapes if ".mixer." not in name}
    norms = {"backbone.norm_f.weight", *(f"backbone.layers.{i}.norm.weight" for i in (0, 1))}
    assert rest == norms | {"backbone.embedding.weight", "lm_head.weight"}


def test_a_published_checkpoint_is_read_by_its_defaults(published):
    folder, model = published
    back = load_language_model(folder)
    assert back.config.vocab_size == 48 and back.config.eos_token_id is None
    assert back.lm_head.weight is back.backbone.embeddings.weight
    assert torch.equal(logits_of(back), logits_of(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attn_layer_idx": [1]},
            "attn_layer_idx = [1], but Transformers' Mamba2 has [] only; take a checkpoint of a",
        ),
        ({"d_intermediate": 64}, "d_intermediate = 64, but Transformers' Mamba2 has 0 only"),
        ({"ssm_cfg": {"D_has_hdim": True}}, "D_has_hdim = True, but Transformers' Mamba2 has False only"),
        ({"ssm_cfg": {"rmsnorm": False}}, "rmsnorm = False, but Transformers' Mamba2 has True only"),
        ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate = True"),
        ({"ssm_cfg": {"d_ssm": 32}}, "ssm_cfg: d_ssm = 32, but Transformers' Mamba2 scans all 64 channels"),
        ({"ssm_cfg": {"dt_rank": 2}}, "mamba_ssm does not know dt_rank; its Mamba-2 has layer, d_state"),
        ({"ssm_cfg": {"headdim": 48}}, "64 channels cannot be heads of headdim = 48 in ngroups = 1"),
        ({"ssm_cfg": {"ngroups": 3}}, "in ngroups = 3 groups of equal size"),
        ({"ssm_cfg": {"dt_limit": [1.0, 0.5]}}, "dt_limit = [1.0, 0.5], expected two numbers"),
        ({"ssm_cfg": {"dt_limit": ["0", 1]}}, "dt_limit = ['0', 1], expected two numbers"),
        ({"ssm_cfg": {"expand": 1.5}}, "ssm_cfg: expand = 1.5, expected int"),
        ({"ssm_cfg": {"d_state": 64}}, "in_proj.weight has the shape (385, 32), the config asks for (257, 32)"),
        ({"n_layer": 1}, "tensors have no place in the config's model, backbone.layers.1"),
    ],
)
def test_a_config_of_something_else_is_refused(published, changes, message):
    folder, _ = published
    changes = changes | {"ssm_cfg": {"layer": "Mamba2"} | changes.get("ssm_cfg", {})}
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes))
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        read_mamba_ssm(folder)
    assert str(folder) in str(refusal.value)


def test_what_does_not_change_the_model_may_be_said(published):
    folder, model = published
    said = {"layer": "Mamba2", "d_ssm": 64, "A_init_range": [1, 16], "dt_min": 0.01, "use_mem_eff_path": False}
    (folder / "config.json").write_text(json.dumps(PUBLISHED | {"ssm_cfg": said}))
    assert torch.equal(logits_of(read_mamba_ssm(folder)), logits_of(model))


def test_a_model_that_was_cut_is_exported_padded_and_taken_up_again(tmp_path, batches, capsys):
    model = build_mamba2()
    compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6)))
    model.save_pretrained(tmp_path / "small")
    exported = export_mamba_ssm(tmp_path / "small", tmp_path / "original")
    assert exported.state_sizes == {0: 6, 1: 6} and exported.difference == 0
    padded = export_uniform(tmp_path / "original", tmp_path / "padded", 16)
    assert padded.state_sizes == {0: 16, 1: 16} and type(load_language_model(padded.folder)) is Mamba2ForCausalLM
    assert main(["export", str(tmp_path / "padded"), str(tmp_path / "again"), "--to", "mamba_ssm"]) == 0
    assert "N = 16; logits differ from the source's by at most 0.0e+00" in capsys.readouterr().out


def test_balanced_states_and_hybrids_of_transformers_are_not_written(tmp_path, batches):
    model = build_mamba2()
    compress(model, analyze(model, batches, CompreSSMConfig(target_state_size=6, basis="balanced")))
    with pytest.raises(ValueError, match=r"project B and C onto balanced states.* basis='axis' for this format"):
        write_mamba_ssm(model, tmp_path / "balanced")
    message = (
        "got a BambaForCausalLM, expected a MambaForCausalLM or Mamba2ForCausalLM; unwrap it first. The format has"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        write_mamba_ssm(build_bamba(), tmp_path / "hybrid")
    epsilon = random_model()
    epsilon.config.layer_norm_epsilon = 1e-6
    with pytest.raises(ValueError, match="cannot express layer_norm_epsilon = 1e-06"):
        write_mamba_ssm(epsilon, tmp_path / "epsilon")
    assert not list(tmp_path.iterdir())
    assert Mamba2Config().layer_norm_epsilon == 1e-5  # which mamba_ssm computes with
