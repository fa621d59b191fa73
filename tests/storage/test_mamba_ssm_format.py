"""The format of mamba_ssm: the same bits there and back, and no model from files that do not hold one.

That the format is mamba_ssm's own was checked against mamba_ssm 2.3.2 itself; here its names and fields are pinned.
"""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_identical, build_model, weights_of
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compressm.storage.mamba_ssm_format import read_mamba_ssm, write_mamba_ssm
from hf_compressm.surgery.shrink_and_grow import pad_state, shrink_state
from hf_compressm.theory.plan import Selection

MIXER = "A_log D conv1d.bias conv1d.weight dt_proj.bias dt_proj.weight in_proj.weight out_proj.weight x_proj.weight"
LAYER = "backbone.layers.0.mixer."
PUBLISHED = {  # state-spaces/mamba-130m, smaller; its vocabulary is padded to 40
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 37,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def random_model(dtype=torch.float32, **changes):
    """A model in which no tensor has the value that it was initialised with."""
    model = build_model(**({"vocab_size": 40} | changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def rewrite_config(folder: Path, **changes):
    """Change fields of the config; None removes one."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))


def rewrite_tensors(folder: Path, **changes):
    """Change tensors of the weights by their names within the first mixer, or by full names; None removes one."""
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors |= {name if "weight" in name else LAYER + name: tensor for name, tensor in changes.items()}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "pytorch_model.bin")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint as it is published: padded vocabulary, nothing said that is a default."""
    folder = tmp_path / "checkpoint"
    write_mamba_ssm(random_model(), folder)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"vocab_size": 37, "hidden_size": 40, "state_size": 5, "time_step_rank": 7, "conv_kernel": 3, "expand": 3},
        {"use_bias": True, "use_conv_bias": False, "residual_in_fp32": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "tie_word_embeddings": False, "hidden_act": "swish", "state_size": 1},
    ],
)
def test_there_and_back_every_bit_is_the_same(tmp_path, changes):
    model = random_model(**changes)
    write_mamba_ssm(model, tmp_path / "new" / "folder")
    before = torch.get_rng_state()
    back = read_mamba_ssm(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    assert_identical(model.state_dict(), back.state_dict())
    assert all(back.state_dict()[name].dtype == tensor.dtype for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model), logits_of(back))
    assert (back.lm_head.weight is back.backbone.embeddings.weight) == model.config.tie_word_embeddings
    fields = "vocab_size state_size time_step_rank conv_kernel expand use_bias use_conv_bias residual_in_fp32".split()
    assert all(getattr(back.config, name) == getattr(model.config, name) for name in fields)
    assert not back.training and all(parameter.requires_grad for parameter in back.parameters())


def test_the_files_are_what_mamba_ssm_reads(tmp_path):
    changes = {"vocab_size": 37, "state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7}
    write_mamba_ssm(random_model(tie_word_embeddings=False, **changes), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 37,
        "ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "conv_bias": True, "bias": False},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
    }
    layer = ["norm.weight", *(f"mixer.{name}" for name in MIXER.split())]
    layers = [f"backbone.layers.{index}.{name}" for index in (0, 1) for name in layer]
    tensors = torch.load(tmp_path / "pytorch_model.bin")
    assert type(tensors) is dict
    assert sorted(tensors) == sorted(
        ["backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight", *layers]
    )
    assert tensors[LAYER + "x_proj.weight"].shape == (7 + 5 + 5, 96)


def test_what_is_written_is_no_larger_than_the_weights(tmp_path):
    model = random_model(vocab_size=1000)
    mixer = model.backbone.layers[0].mixer
    mixer.A_log.data = torch.rand(1000, 64, 16)[3]  # a view of a large storage
    write_mamba_ssm(model, tmp_path)
    weights = sum(parameter.nbytes for parameter in model.parameters())  # a tied one counts once
    assert weights < (tmp_path / "pytorch_model.bin").stat().st_size < weights + 20_000


def test_a_model_that_was_cut_is_written_over_its_older_self(tmp_path, trained):
    model, _ = trained
    write_mamba_ssm(model, tmp_path)
    shrink_state(model, {i: Selection(torch.arange(4) + i) for i in (0, 1)})
    write_mamba_ssm(model, tmp_path)
    back = read_mamba_ssm(tmp_path)
    assert back.config.state_size == 4
    assert_identical(model.state_dict(), back.state_dict())
    pad_state(back, 16)  # and the model is one like any other
    assert back.config.state_size == 16


def test_a_published_checkpoint_keeps_its_padded_rows_and_says_so(checkpoint, monkeypatch):
    tensors, said = torch.load(checkpoint / "pytorch_model.bin"), []
    monkeypatch.setattr("hf_compressm.storage.mamba_ssm_format.logger.warning", said.append)
    model = read_mamba_ssm(checkpoint)
    assert len(said) == 1 and "pads its 37 tokens to 40 rows" in said[0]
    assert model.config.vocab_size == 40 and logits_of(model).shape[-1] == 40
    assert model.config.eos_token_id is None  # nobody said which
    assert torch.equal(model.lm_head.weight, tensors["backbone.embedding.weight"])
    assert torch.equal(logits_of(model), logits_of(random_model()))
    model.save_pretrained(checkpoint / "transformers")
    again = type(model).from_pretrained(checkpoint / "transformers")
    assert_identical(weights_of(again), weights_of(model))


@pytest.mark.parametrize(
    "fields",
    [
        {"ssm_cfg": {"dt_rank": "auto", "dt_min": 0.01, "dt_init": "constant", "use_fast_path": False}},
        {"ssm_cfg": {"layer": "Mamba1", "d_state": 16, "dt_rank": 2}, "fused_add_norm": False},
        {"vocab_size": 40, "pad_vocab_size_multiple": 5, "attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0},
        {"residual_in_fp32": None, "rms_norm": None, "fused_add_norm": None, "pad_vocab_size_multiple": None},
    ],
)
def test_what_does_not_change_the_model_may_be_said_or_left_out(checkpoint, fields):
    rewrite_config(checkpoint, **fields)
    assert torch.equal(logits_of(read_mamba_ssm(checkpoint)), logits_of(random_model()))


def test_a_dtype_of_its_own_for_decay_and_skip_is_kept(checkpoint):
    tensors = torch.load(checkpoint / "pytorch_model.bin")
    mixed = {name: t if name.endswith((".A_log", ".D")) else t.bfloat16() for name, t in tensors.items()}
    torch.save(mixed, checkpoint / "pytorch_model.bin")
    model = read_mamba_ssm(checkpoint)
    assert model.backbone.layers[1].mixer.A_log.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert logits_of(model).isfinite().all()
    write_mamba_ssm(model, checkpoint / "again")
    assert_identical(model.state_dict(), read_mamba_ssm(checkpoint / "again").state_dict())


def test_untied_weights_that_share_storage_become_two(checkpoint):
    rewrite_config(checkpoint, tie_embeddings=False)
    model = read_mamba_ssm(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.backbone.embeddings.weight.abs().sum() > 0


NAN, INFINITE = torch.full((64,), float("nan")), torch.full((64,), float("-inf"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": None}, "lacks d_model"),
        ({"n_layer": None, "vocab_size": None}, "lacks n_layer, vocab_size"),
        ({"d_model": 32.0}, "d_model = 32.0, expected int of at least 1"),
        ({"d_model": True}, "d_model = True, expected int"),
        ({"n_layer": "2"}, "n_layer = '2', expected int"),
        ({"vocab_size": 0}, "vocab_size = 0, expected int of at least 1"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple = 0"),
        ({"rms_norm": 1}, "rms_norm = 1, expected bool"),
        ({"ssm_cfg": []}, "ssm_cfg = [], expected dict"),
        ({"ssm_cfg": {"expand": 1.5}}, "ssm_cfg: expand = 1.5, expected int"),
        ({"ssm_cfg": {"dt_rank": "full"}}, "ssm_cfg: dt_rank = 'full', expected int"),
        ({"ssm_cfg": {"d_state": -16}}, "ssm_cfg: d_state = -16"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg: mamba_ssm does not know headdim"),
        ({"norm_epsilon": 1e-6}, "does not know norm_epsilon"),
        ({"model_type": "mamba"}, "is a config of Transformers, not of mamba_ssm; use from_pretrained"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg: layer = 'Mamba3'; allowed: 'Mamba1', 'Mamba2'."),
        ({"attn_layer_idx": [1]}, "attn_layer_idx = [1], but Transformers' Mamba has [] only"),
        ({"d_intermediate": 64}, "d_intermediate = 64, but Transformers' Mamba has 0 only"),
        ({"rms_norm": False}, "rms_norm = False, but Transformers' Mamba has True only"),
    ],
)
def test_a_config_of_something_else_is_refused(checkpoint, fields, message):
    rewrite_config(checkpoint, **fields)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        read_mamba_ssm(checkpoint)
    assert str(checkpoint / "config.json") in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        (
            {"n_layer": 1},
            {},
            "10 tensors have no place in the config's model, backbone.layers.1.mixer.A_log among them",
        ),
        ({"n_layer": 3}, {}, "10 tensors that the config asks for are missing, backbone.layers.2.mixer.A_log"),
        ({"n_layer": 10**12}, {}, "holds 23 tensors, config.json says n_layer = 1000000000000"),
        ({"d_model": 48}, {}, "backbone.embedding.weight has the shape (40, 32), the config asks for (40, 48)"),
        ({"d_model": 10**30}, {}, "backbone.embedding.weight has the shape (40, 32)"),
        ({"vocab_size": 41}, {}, "has the shape (40, 32), the config asks for (48, 32)"),
        ({"ssm_cfg": {"d_state": 8}}, {}, "x_proj.weight has the shape (34, 64), the config asks for (18, 64)"),
        ({"ssm_cfg": {"d_state": 17, "dt_rank": 1}}, {}, "the config asks for (35, 64)"),
        ({"ssm_cfg": {"d_conv": 3}}, {}, "conv1d.weight has the shape (64, 1, 4), the config asks for (64, 1, 3)"),
        ({"ssm_cfg": {"expand": 1}}, {}, "in_proj.weight has the shape (128, 32), the config asks for (64, 32)"),
        ({"ssm_cfg": {"bias": True}}, {}, "4 tensors that the config asks for are missing"),
        ({"ssm_cfg": {"conv_bias": False}}, {}, "2 tensors have no place"),
        ({}, {"D": None}, "1 tensors that the config asks for are missing, backbone.layers.0.mixer.D among them"),
        ({}, {"lm_head.weight": None}, "1 tensors that the config asks for are missing, lm_head.weight"),
        ({}, {"E": torch.ones(64)}, "1 tensors have no place in the config's model, backbone.layers.0.mixer.E among"),
        ({}, {"D": torch.ones(65)}, "backbone.layers.0.mixer.D has the shape (65,), the config asks for (64,)"),
        ({}, {"D": torch.ones(64, 1)}, "D has the shape (64, 1)"),
        ({}, {"D": NAN}, "backbone.layers.0.mixer.D holds NaN or infinity"),
        ({}, {"dt_proj.bias": INFINITE}, "backbone.layers.0.mixer.dt_proj.bias holds NaN or infinity"),
        ({}, {"D": torch.ones(64, dtype=torch.int64)}, "D is of torch.int64"),
        ({}, {"D": torch.ones(64, dtype=torch.complex64)}, "D is of torch.complex64"),
        (
            {},
            {"dt_proj.bias": torch.ones(64).half()},
            "weights are of torch.float16, torch.float32, expected one dtype",
        ),
        ({}, {"D": torch.ones(64, device="meta")}, "D is no plain dense tensor (Tensor, torch.strided, meta)"),
        ({}, {"D": torch.ones(64).to_sparse()}, "D is no plain dense tensor (Tensor, torch.sparse_coo, cpu)"),
        ({}, {"lm_head.weight": torch.ones(40, 32)}, "lm_head.weight differs from backbone.embedding.weight, but the"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(checkpoint, fields, tensors, message):
    rewrite_config(checkpoint, **fields)
    rewrite_tensors(checkpoint, **tensors)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        read_mamba_ssm(checkpoint)
    assert str(checkpoint / "pytorch_model.bin") in str(refusal.value)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{checkpoint / name} is missing. Give a local folder")):
        read_mamba_ssm(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"d_model": 32, "n_la', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "holds no table of names and values"),
    ],
)
def test_a_damaged_config_is_refused(checkpoint, content, message):
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_mamba_ssm(checkpoint)
    assert str(checkpoint / "config.json") in str(refusal.value)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_weights_are_refused(checkpoint, share):
    file = checkpoint / "pytorch_model.bin"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"{file} is truncated, damaged or no archive of tensors only")):
        read_mamba_ssm(checkpoint)


def test_a_file_without_checksums_is_refused(checkpoint):
    file = checkpoint / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="write the model's state_dict with torch.save of today"):
        read_mamba_ssm(checkpoint)


def test_a_flipped_bit_is_refused(checkpoint):
    file = checkpoint / "pytorch_model.bin"
    content, weights = file.read_bytes(), torch.load(file)[LAYER + "A_log"].numpy().tobytes()
    position = content.index(weights) + 1000
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.raises(ValueError, match="truncated, damaged"):
        read_mamba_ssm(checkpoint)


def test_a_record_without_data_is_refused(checkpoint):
    """One flipped bit makes a directory of a record; torch would leave whatever is in memory in the tensor's place."""
    file = checkpoint / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02", content.index(b"/data/1PK\x01\x02")) + 38] |= 0x10
    file.write_bytes(content)
    with pytest.raises(ValueError, match="truncated, damaged"):
        read_mamba_ssm(checkpoint)


def test_the_same_model_gives_the_same_bytes(tmp_path, monkeypatch):
    write_mamba_ssm(random_model(), tmp_path / "one")
    monkeypatch.setattr("os.getpid", lambda: 1)
    write_mamba_ssm(random_model(), tmp_path / "two")
    assert (tmp_path / "one" / "pytorch_model.bin").read_bytes() == (
        tmp_path / "two" / "pytorch_model.bin"
    ).read_bytes()


class Touch:
    """An object that touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["archive", "legacy", "pickle"])
def test_code_in_a_pickle_does_not_run(checkpoint, kind):
    file, trace = checkpoint / "pytorch_model.bin", checkpoint / "trace"
    content = torch.load(file) | {"backbone.norm_f.weight": Touch(trace)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content["backbone.norm_f.weight"], protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "archive")
    with pytest.raises(ValueError, match="no code in it was run"):
        read_mamba_ssm(checkpoint)
    assert not trace.exists()
    if kind != "pickle":  # the charge was live
        torch.load(file, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}, torch.ones(2), {"a": 1}])
def test_other_contents_are_refused(checkpoint, content):
    torch.save(content, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no plain dict of tensors by name"):
        read_mamba_ssm(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06: mamba_ssm computes with 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': mamba_ssm computes with 'silu' or 'swish'"),
        ({"intermediate_size": 48}, "intermediate_size = 48: mamba_ssm computes with 64"),
    ],
)
def test_what_the_format_cannot_express_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_mamba_ssm(random_model(**changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_that_would_not_be_read_are_not_written(tmp_path):
    def spoil(change):
        model = random_model()
        with torch.no_grad():
            change(model)
        return model

    def untie(model):
        model.lm_head.weight = torch.nn.Parameter(torch.ones(40, 32))

    def resize_one_layer(model):
        mixer = model.backbone.layers[1].mixer
        mixer.ssm_state_size, mixer.A_log.data = 8, mixer.A_log[:, :8].clone()
        mixer.x_proj.weight.data = mixer.x_proj.weight[: mixer.time_step_rank + 16].clone()

    spoiled = {
        "backbone.norm_f.weight holds NaN": spoil(lambda model: model.backbone.norm_f.weight.fill_(float("nan"))),
        "expected one dtype": spoil(lambda model: model.backbone.norm_f.bfloat16()),
        "lm_head.weight differs from backbone.embedding.weight": spoil(untie),
        "layers have [8, 16] states, the format has one number for all; pad first": spoil(resize_one_layer),
        "the config asks for (12, 64)": spoil(lambda model: setattr(model.config, "state_size", 5)),
        "tensors have no place": spoil(lambda model: model.register_parameter("E", torch.nn.Parameter(torch.ones(1)))),
        "meta": spoil(lambda model: model.to("meta")),
        "got a Sequential, expected a MambaForCausalLM or Mamba2ForCausalLM; unwrap it": torch.nn.Sequential(
            random_model()
        ),
        "got a LlamaForCausalLM": LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        ),
    }
    for message, model in spoiled.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            write_mamba_ssm(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_transformers_is_not_written_over(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a checkpoint of Transformers"):
        write_mamba_ssm(model, tmp_path)
    assert_identical(weights_of(type(model).from_pretrained(tmp_path)), weights_of(model))
