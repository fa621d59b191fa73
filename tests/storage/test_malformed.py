"""Files that are damaged, contradict each other, or mean harm: one error that says which; no code runs."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from conftest import contents, copy_of
from safetensors.torch import load_file, save_file

from hf_compressm.storage.checkpoint import check_checkpoint
from hf_compressm.storage.export import export_mamba_ssm, export_sharded
from hf_compressm.storage.history import load_history
from hf_compressm.storage.loading import load_language_model
from hf_compressm.storage.mamba_ssm_format import read_mamba_ssm

HUGE, NAN, DEEP = 10**12, float("nan"), "[" * 100_000
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HISTORY, SPECTRA, PICKLE = "compressm.json", "hsv.safetensors", "pytorch_model.bin"
A_LOG, SPECTRUM = "backbone.layers.1.mixer.A_log", "event.0.layer.0"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="session")
def sound(models, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sound")
    export_sharded(models / "uniform", folder / "sharded", "20KB")
    export_mamba_ssm(models / "uniform", folder / "mamba_ssm")
    return {"uniform": models / "uniform", "per_layer": models / "per_layer"} | {
        name: folder / name for name in ("sharded", "mamba_ssm")
    }


def refused(source: Path, tmp_path: Path, damage, message: str, *readers) -> None:
    """Every reader refuses a damaged copy with one of two errors that says what, and changes nothing in it."""
    folder = copy_of(source, tmp_path / "damaged")
    damage(folder)
    before = contents(tmp_path)
    for reader in readers:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            reader(folder)
        assert type(caught.value) in (ValueError, FileNotFoundError)
        assert str(folder) in str(caught.value) or "damaged" in str(caught.value)
        assert contents(tmp_path) == before


def cases(*table):
    """Rows whose test ids are numbered messages."""
    ids = [f"{i}-{row[-1][:40]}" for i, row in enumerate(table)]
    return pytest.mark.parametrize(("damage", "message"), [row[-2:] for row in table], ids=ids)


def text(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, length: int):
    """Only the first bytes of a file; without the last ones, for a negative length."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def replaced(name: str, put):
    """Another thing in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return damage


def gone(name: str):
    return lambda folder: (folder / name).unlink()


def entry(name: str, *path, value):
    """Change one entry of a JSON file; `value` is put at `path`."""

    def damage(folder: Path) -> None:
        content = at = json.loads((folder / name).read_text())
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return damage


def config(**entries):
    return lambda folder: [entry(CONFIG, name, value=value)(folder) for name, value in entries.items()]


def no_entry(name: str, *path):
    def damage(folder: Path) -> None:
        content = at = json.loads((folder / name).read_text())
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        (folder / name).write_text(json.dumps(content))

    return damage


def tensors(change, name: str = WEIGHTS):
    """`change` the dict of tensors in a safetensors file."""

    def damage(folder: Path) -> None:
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name, {"format": "pt"})

    return damage


def tensor(key: str, change, name: str = WEIGHTS):
    return tensors(lambda content: content.update({key: change(content[key]).contiguous()}), name)


def header(content: dict | bytes, length: int | None = None, data: bytes = b"\0" * 64, name: str = WEIGHTS):
    """A safetensors file of this header, which may lie about its length."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text(name, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def floats(start: int, end: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def filled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[3] = value
    return changed


# What the headers show: the check before a resume and the loading must both see it.


@cases(
    # config.json as a file
    (text(CONFIG, ""), "config.json is truncated or damaged"),
    (cut(CONFIG, 100), "config.json is truncated or damaged"),
    (text(CONFIG, "[]"), "config.json is damaged: it holds no table"),
    (text(CONFIG, "null"), "config.json is damaged: it holds no table"),
    (text(CONFIG, '"mamba"'), "config.json is damaged: it holds no table"),
    (text(CONFIG, b"\xff\xfe\x00"), "config.json is truncated or damaged"),
    (text(CONFIG, '{"model_type": ' + DEEP), "config.json is truncated or damaged"),
    (text(CONFIG, '{"model_type": ' + "9" * 5000 + "}"), "config.json is truncated or damaged"),
    (text(CONFIG, b'{"model_type": "mamba", "state_size": \x00 4}'), "config.json is truncated or damaged"),
    (gone(CONFIG), "config.json"),
    (replaced(CONFIG, lambda path: path.symlink_to("nowhere")), "config.json"),
    (replaced(CONFIG, lambda path: path.symlink_to(path.name)), "config.json is truncated or damaged"),
    (replaced(CONFIG, Path.mkdir), "config.json is truncated or damaged"),
    # its values
    (no_entry(CONFIG, "model_type"), "type 'None'; supported: mamba"),
    (config(model_type="gpt2"), "type 'gpt2'; supported: mamba"),
    (config(model_type=["mamba"]), r"type '\['mamba'\]'; supported: mamba"),
    (config(model_type={}), "supported: mamba"),
    (config(model_type=None), "type 'None'"),
    (config(model_type="compressm_mamba/../mamba"), "supported: mamba"),
    *(
        (config(num_hidden_layers=value), "num_hidden_layers = .*; allowed: a whole number up to")
        for value in ("2", 2.0, [2], {}, None, NAN, True, -1, HUGE, 10**400)
    ),
    (config(num_hidden_layers=0), r"config.json the layers \[\] have a state"),
    (config(num_hidden_layers=1), r"config.json the layers \[0\] have a state"),
    (config(num_hidden_layers=3), r"config.json the layers \[0, 1, 2\] have a state; the checkpoint is incomplete"),
    (no_entry(CONFIG, "num_hidden_layers"), "num_hidden_layers = None"),
    (no_entry(CONFIG, "state_size"), r"state sizes \[None, None\]"),
    *((config(state_size=value), "2 layers the state sizes") for value in ("4", 4.0, {}, None, NAN, True, -4, 0)),
    *((config(state_size=value), "2 layers the state sizes") for value in ([4], [4, 4, 4], [4, "4"], [], [4, [4]])),
    (config(state_size=HUGE), f"layer 0 has 4 states, config.json says state_size = {HUGE}"),
    (config(state_size=16), "layer 0 has 4 states, config.json says state_size = 16"),
    # the weights as a file
    (text(WEIGHTS, b""), "model.safetensors is truncated or damaged"),
    (text(WEIGHTS, b"\0" * 8), "model.safetensors is truncated or damaged"),
    (cut(WEIGHTS, 4), "model.safetensors is truncated or damaged"),
    (cut(WEIGHTS, 1000), "model.safetensors is truncated or damaged"),
    (cut(WEIGHTS, -1), "model.safetensors is truncated or damaged"),
    (text(WEIGHTS, b"PK\x03\x04" + b"\0" * 100), "model.safetensors is truncated or damaged"),
    (gone(WEIGHTS), "has no model.safetensors"),
    (replaced(WEIGHTS, lambda path: path.symlink_to("nowhere")), "has no model.safetensors"),
    (replaced(WEIGHTS, Path.mkdir), "has no model.safetensors"),
    # its header
    (header({}, length=HUGE), "model.safetensors is truncated or damaged"),
    (header({}, length=2**64 - 1), "model.safetensors is truncated or damaged"),
    (header({"a": floats(0, 32, 8), "b": floats(16, 48, 8)}), "model.safetensors is truncated or damaged"),
    (header({"a": floats(0, 32, 8), "b": floats(0, 32, 8)}, data=b"\0" * 32), "is truncated or damaged"),
    (header({"a": floats(0, 32, 9)}, data=b"\0" * 32), "model.safetensors is truncated or damaged"),
    (header({"a": floats(32, 0, 8)}), "model.safetensors is truncated or damaged"),
    (header({"a": floats(0, 64, HUGE, HUGE)}), "model.safetensors is truncated or damaged"),
    (header({"a": floats(0, 64, -4, -4)}), "model.safetensors is truncated or damaged"),
    (header({"a": floats(0, 10**9, 250_000_000)}), "model.safetensors is truncated or damaged"),
    (header({"a": floats(0, 64, 16) | {"dtype": "X9"}}), "model.safetensors is truncated or damaged"),
    (header({"a": 5}), "model.safetensors is truncated or damaged"),
    (header(b"[]"), "model.safetensors is truncated or damaged"),
    (header(b"\xff\xfe"), "model.safetensors is truncated or damaged"),
    (header(DEEP.encode()), "model.safetensors is truncated or damaged"),
    (header({}, data=b""), r"hold states of the layers \[\], by config.json the layers \[0, 1\]"),
    # its tensors
    (tensors(lambda content: content.pop(A_LOG)), r"layer 1 has no A_log"),
    (tensors(lambda c: c.update({A_LOG.replace("1", "2"): torch.ones(64, 4)})), r"layers \[0, 1, 2\]"),
    (tensors(lambda c: c.update({"copy.layers.1.mixer.A_log": torch.ones(64, 4)})), "second A_log of its layer"),
    (tensors(lambda c: c.update({"mixer.A_log": torch.ones(64, 4)})), "mixer.A_log of shape .64, 4. is not a layer's"),
    (tensors(lambda c: c.update({f"layers.{'9' * 400}.mixer.A_log": torch.ones(64, 4)})), "hold states of the layers"),
    (tensor(A_LOG, lambda A: A[:, :3]), "layer 1 has 3 states, config.json says state_size = 4"),
    (tensor(A_LOG, lambda A: A[:, 0]), "layers.1.mixer.A_log of shape .64,. is not a layer's"),
    (tensor(A_LOG, lambda A: A[None]), "layer 1 has 64 states"),
    *(
        (tensor(A_LOG, lambda A, dtype=dtype: A.to(dtype)), "layers.1.mixer.A_log is of .*, expected F64")
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
    ),
)
def test_a_checkpoint_that_its_headers_betray_is_refused(sound, tmp_path, damage, message):
    refused(sound["uniform"], tmp_path, damage, message, check_checkpoint, load_language_model)


def per_layer(value):
    return config(per_layer_config=value)


@cases(
    *(
        (per_layer(value), "per_layer_config = .*; allowed: a table of layers")
        for value in ("x", 5, [{"state_size": 8}])
    ),
    *(
        (per_layer({name: {"state_size": 8}}), "per_layer_config names a layer .*; allowed: 0 … 1")
        for name in ("2", "-1", "-2", "x", "", "0.0", " 0", "00", "1e0", "٠", str(HUGE), "9" * 5000)
    ),
    *(
        (per_layer({"0": value}), "per_layer_config gives layer 0 .*; allowed: state_size only")
        for value in (
            8,
            None,
            [8],
            "8",
            {},
            {"hidden_size": 64},
            {"state_size": 8, "hidden_act": "relu"},
            {"state_size": 8, "hidden_size": 64},
            {"state_size": 8, "skip": True},
            {"state_size": 8, "skip": ["mixer"]},
            {"state_size": 8, "model_type": "gpt2"},
            {"state_size": 8, "auto_map": {"AutoModel": "x.Y"}},
        )
    ),
    *(
        (per_layer({"0": {"state_size": v}}), "layers the state sizes")
        for v in (0, -8, 8.0, "8", [8], None, True, NAN)
    ),
    (per_layer({"0": {"state_size": HUGE}}), f"layer 0 has 8 states, config.json says state_size = {HUGE}"),
    (per_layer({"0": {"state_size": 7}}), "layer 0 has 8 states, config.json says state_size = 7"),
    (per_layer({}), "layer 0 has 8 states, config.json says state_size = 16"),
    (per_layer(None), "layer 0 has 8 states, config.json says state_size = 16"),
    (no_entry(CONFIG, "per_layer_config"), "layer 0 has 8 states, config.json says state_size = 16"),
    (per_layer({"0": {"state_size": 8}, "1": {"state_size": 8}}), "layer 1 has 16 states"),
)
def test_sizes_per_layer_that_make_no_sense_are_refused(sound, tmp_path, damage, message):
    refused(sound["per_layer"], tmp_path, damage, message, check_checkpoint, load_language_model)


def weight_map(value):
    return entry(INDEX, "weight_map", value=value)


def second_copy(folder: Path) -> None:
    """A tensor that two shards hold."""
    shards = sorted(folder.glob("model-*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    save_file(second | dict([next(iter(first.items()))]), shards[1], {"format": "pt"})


@cases(
    (text(INDEX, ""), "index.json is truncated or damaged"),
    (text(INDEX, b"\xff"), "index.json is truncated or damaged"),
    (text(INDEX, DEEP), "index.json is truncated or damaged"),
    (text(INDEX, "[]"), "index.json is damaged"),
    (no_entry(INDEX, "weight_map"), "index.json has no weight_map"),
    *((weight_map(value), "index.json has no weight_map") for value in (5, [], "x", None, {"a": 5}, {"a": None})),
    *(
        (weight_map({A_LOG: name}), "index.json names the file .*, outside of its folder; do not use it")
        for name in ("../x", "/etc/passwd", "..", ".", "", "a/../../b", "sub/model.safetensors", "x/")
    ),
    (weight_map({A_LOG: "missing.safetensors"}), "has no missing.safetensors"),
    (weight_map({A_LOG: "a\0b"}), "has no a"),
    (weight_map({A_LOG: "config.json"}), "config.json is truncated or damaged"),
    (weight_map({}), r"hold states of the layers \[\]"),
    (lambda folder: min(folder.glob("model-*")).unlink(), "has no model-00001"),
    (lambda folder: min(folder.glob("model-*")).write_bytes(b""), "model-00001.*is truncated or damaged"),
    (second_copy, "model-00002-.* holds .*, as another file does"),
    (text(WEIGHTS, b"no"), "model.safetensors is truncated or damaged"),  # which Transformers would read
)
def test_shards_that_do_not_make_one_model_are_refused(sound, tmp_path, damage, message):
    refused(sound["sharded"], tmp_path, damage, message, check_checkpoint, load_language_model)


# What only shows when the model is built, or in the numbers.


@cases(
    *(
        (config(**{name: value}), f"cannot be loaded .*{name}")
        for name in ("vocab_size", "hidden_size", "conv_kernel", "time_step_rank")
        for value in (16.0, [16], NAN, {}, None)
    ),
    *((config(**{name: HUGE}), "has the shape .*, the config asks for") for name in ("vocab_size", "conv_kernel")),
    *((config(hidden_size=value), "cannot be loaded") for value in (HUGE, -32, 0, 16, 10**30)),
    *((config(intermediate_size=value), "cannot be loaded") for value in (HUGE, -64, 0, 64.0, "64", NAN, [64])),
    *((config(vocab_size=value), "cannot be loaded") for value in (-1, 0, 511, "512")),
    *((config(time_step_rank=value), "cannot be loaded") for value in (HUGE, -2, 0, 3, "3", "x")),
    (config(hidden_act="nope"), "cannot be loaded .*nope"),
    (config(layer_norm_epsilon="1e-5"), "cannot be loaded .*layer_norm_epsilon"),
    (config(use_bias="no"), "cannot be loaded .*use_bias"),
    (config(use_bias=True), "missing keys .*in_proj.bias"),
    (config(use_conv_bias=False), "unexpected keys .*conv1d.bias"),
    (config(dtype="evil"), "cannot be loaded .*evil"),
    (config(id2label=5), "cannot be loaded"),
    (config(eos_token_id="x"), "cannot be loaded .*eos_token_id"),
    (config(deep=json.loads("[" * 900 + "]" * 900)), "cannot be loaded|truncated or damaged"),
    (config(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config = .*; allowed: none"),
    (config(attn_implementation="someone/kernel"), "attn_implementation = 'someone/kernel'; allowed: none"),
    (config(_attn_implementation="someone/kernel"), "_attn_implementation = 'someone/kernel'; allowed: none"),
    (config(transformers_weights="../other.safetensors"), "transformers_weights = '../other.safetensors'"),
    (text("adapter_config.json", '{"base_model_name_or_path": "../other"}'), r"an adapter \(adapter_config.json\)"),
    (text("generation_config.json", "[]"), "cannot be loaded"),
    (text("generation_config.json", DEEP), "cannot be loaded"),
    (tensors(lambda c: c.pop("backbone.norm_f.weight")), r"missing keys \['backbone.norm_f.weight'\]"),
    (tensors(lambda c: c.update({"evil": torch.ones(3)})), r"unexpected keys \['evil'\]"),
    (tensor("backbone.layers.0.mixer.D", lambda D: D[:-1]), "0.mixer.D has the shape .63,., the config asks for .64"),
    (tensor(A_LOG, lambda A: A[:0]), "1.mixer.A_log has the shape .0, 4., the config asks for"),
    (tensor("backbone.layers.0.mixer.x_proj.weight", lambda x: x.T), "x_proj.weight has the shape .64, 10."),
    *(
        (tensor(name, lambda t, value=value: filled(t, value)), f"{name} holds NaN or Inf")
        for name in (A_LOG, "backbone.embeddings.weight", "backbone.norm_f.weight")
        for value in (NAN, float("inf"), -float("inf"))
    ),
)
def test_a_model_that_cannot_be_built_or_used_is_refused(sound, tmp_path, damage, message):
    refused(sound["uniform"], tmp_path, damage, message, load_language_model)


@pytest.mark.parametrize("kind", ["per_layer", "uniform"])
@pytest.mark.parametrize("broken", [False, True])
def test_code_beside_the_weights_never_runs(sound, tmp_path, kind, broken):
    """The model is loaded with our own classes, or refused."""
    folder, mark = copy_of(sound[kind], tmp_path / "model"), tmp_path / "ran"
    names = ["modeling_compressm_mamba", "evil", "configuration_evil", "__init__", "hf_compressm", "sitecustomize"]
    for name in names:
        (folder / f"{name}.py").write_text(f"from pathlib import Path\n\nPath({str(mark)!r}).touch()\n")
    module = "evil.Evil" if kind == "uniform" else "modeling_compressm_mamba.CompreSSMMambaForCausalLM"
    auto_map = {"AutoConfig": module, "AutoModelForCausalLM": module, "AutoModel": f"someone/evil--{module}"}
    config(auto_map=auto_map, trust_remote_code=True, **({"model_type": "evil"} if broken else {}))(folder)
    text("generation_config.json", '{"custom_generate": "evil.py", "trust_remote_code": true}')(folder)
    before = contents(tmp_path)
    if broken:
        with pytest.raises(ValueError, match="type 'evil'"):
            load_language_model(folder)
    else:
        assert type(load_language_model(folder)).__module__.split(".")[0] in ("transformers", "hf_compressm")
    assert contents(tmp_path) == before and not mark.exists()


@pytest.mark.parametrize("kind", ["uniform", "mamba_ssm"])
@pytest.mark.parametrize("archive", [False, True])
def test_code_in_a_pickle_never_runs(sound, tmp_path, kind, archive):
    folder, mark = copy_of(sound[kind], tmp_path / "model"), tmp_path / "ran"
    content = {"backbone.embedding.weight": Payload(mark)}
    (torch.save if archive else lambda what, path: path.write_bytes(pickle.dumps(what)))(content, folder / PICKLE)
    if kind == "uniform":
        (folder / WEIGHTS).unlink()
    before = contents(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="no code in it was run|has no model.safetensors"):
        load_language_model(folder)
    if kind == "mamba_ssm":
        with pytest.raises(ValueError, match="pytorch_model.bin is truncated, damaged or"):
            read_mamba_ssm(folder)
    assert contents(tmp_path) == before and not mark.exists()


def pickled(change):
    def damage(folder: Path) -> None:
        content = torch.load(folder / PICKLE, weights_only=True)
        torch.save(change(content), folder / PICKLE)

    return damage


def flipped(folder: Path) -> None:
    """One bit in the middle of the weights."""
    raw = bytearray((folder / PICKLE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / PICKLE).write_bytes(raw)


def ssm(**entries):
    return lambda folder: [entry(CONFIG, "ssm_cfg", name, value=value)(folder) for name, value in entries.items()]


@cases(
    (text(PICKLE, b""), "pytorch_model.bin is truncated, damaged"),
    (text(PICKLE, b"\x80"), "pytorch_model.bin is truncated, damaged"),
    (text(PICKLE, DEEP), "pytorch_model.bin is truncated, damaged"),
    (cut(PICKLE, -100), "pytorch_model.bin is truncated, damaged"),
    (cut(PICKLE, 1000), "pytorch_model.bin is truncated, damaged"),
    (flipped, "pytorch_model.bin is truncated, damaged"),
    (gone(PICKLE), "pytorch_model.bin is missing"),
    (replaced(PICKLE, lambda path: path.symlink_to("nowhere")), "pytorch_model.bin is missing"),
    (replaced(PICKLE, Path.mkdir), "pytorch_model.bin is missing"),
    (pickled(lambda content: list(content.values())), "holds no plain dict of tensors"),
    (pickled(lambda content: content | {"x": 5}), "holds no plain dict of tensors"),
    (pickled(lambda content: content | {"x": torch.ones(1)}), "have no place in the config's model, x among them"),
    (pickled(lambda content: {}), "pytorch_model.bin holds 0 tensors"),
    (pickled(lambda c: {k: v for k, v in c.items() if k != A_LOG}), "missing, .*layers.1.mixer.A_log among them"),
    (pickled(lambda c: c | {A_LOG: c[A_LOG].T.contiguous()}), r"A_log has the shape \(4, 64\)"),
    (pickled(lambda c: c | {A_LOG: c[A_LOG].long()}), "A_log is of torch.int64"),
    (pickled(lambda c: c | {A_LOG: c[A_LOG] * NAN}), "A_log holds NaN or infinity"),
    (pickled(lambda c: c | {A_LOG: c[A_LOG].to_sparse()}), "no plain dense tensor|truncated, damaged"),
    (no_entry(CONFIG, "vocab_size"), "config.json lacks vocab_size"),
    (no_entry(CONFIG, "n_layer"), "config.json lacks n_layer"),
    (config(evil=5), "config.json: mamba_ssm does not know evil"),
    *(
        (config(**{name: value}), f"config.json: {name} = .*, expected int of at least 1")
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple")
        for value in ("2", 2.0, [2], None, NAN, True, 0, -1)
    ),
    (config(n_layer=HUGE), f"n_layer = {HUGE}"),
    (config(d_model=HUGE), "has the shape"),
    (config(vocab_size=HUGE), "has the shape"),
    (config(pad_vocab_size_multiple=HUGE), "has the shape"),
    (config(ssm_cfg=[]), r"ssm_cfg = \[\], expected dict"),
    (config(tie_embeddings=1), "tie_embeddings = 1, expected bool"),
    (ssm(layer="Mamba3"), "layer = 'Mamba3'; allowed: 'Mamba1', 'Mamba2'"),
    (ssm(layer=["Mamba2"]), "layer = .*; allowed: 'Mamba1', 'Mamba2'"),
    *(
        (ssm(d_state=value), "ssm_cfg: d_state = .*, expected int")
        for value in ("4", 4.0, [4], None, NAN, True, 0, -4)
    ),
    (ssm(d_state=HUGE), "has the shape"),
    (ssm(dt_rank="evil"), "ssm_cfg: dt_rank = 'evil', expected int"),
    (ssm(evil=5), "ssm_cfg: mamba_ssm does not know evil"),
    (text(CONFIG, '{"d_model": 32, "n_layer": ' + DEEP), "config.json is truncated"),
    (text(CONFIG, b'{"d_model": \xff}'), "config.json is truncated"),
)
def test_a_checkpoint_of_mamba_ssm_that_is_malformed_is_refused(sound, tmp_path, damage, message):
    refused(sound["mamba_ssm"], tmp_path, damage, message, read_mamba_ssm, load_language_model)


# The history: compressm.json and hsv.safetensors.


def event(**entries):
    return lambda folder: [entry(HISTORY, "events", 0, name, value=value)(folder) for name, value in entries.items()]


def spectrum(change):
    return tensor(SPECTRUM, change, SPECTRA)


NUMBERS = ("seconds", "measuring_seconds", "loss_before", "loss_after")


@cases(
    (text(HISTORY, ""), "compressm.json is truncated or damaged"),
    (cut(HISTORY, -10), "compressm.json is truncated or damaged"),
    (text(HISTORY, b"\xff"), "compressm.json is truncated or damaged"),
    (text(HISTORY, '{"events": ' + DEEP), "compressm.json is truncated or damaged"),
    (text(HISTORY, "[]"), "compressm.json is damaged: it holds no table"),
    (text(HISTORY, "{}"), "of which compressm.json knows nothing"),
    (gone(HISTORY), "compressm.json"),
    (replaced(HISTORY, lambda path: path.symlink_to("nowhere")), "compressm.json"),
    (replaced(HISTORY, Path.mkdir), "compressm.json is truncated or damaged"),
    *(
        (entry(HISTORY, "format_version", value=value), "compressm.json: history format .*; readable up to 1")
        for value in ("1", 1.0, [1], None, True, 0, -1, 2, HUGE, NAN)
    ),
    *((entry(HISTORY, "config", value=value), "config = ") for value in ("x", 5, [], None)),
    *((entry(HISTORY, "schedule", value=value), "schedule = ") for value in ("x", 5, [])),
    *((entry(HISTORY, "library_version", value=value), "library_version = ") for value in (5, [], None, {})),
    *((no_entry(HISTORY, name), "malformed history") for name in ("format_version", "config", "schedule")),
    *(
        (entry(HISTORY, "events", value=value), "damaged|knows nothing")
        for value in ("x", 5, {}, None, [5], [[]], [{}])
    ),
    *((entry(HISTORY, "observations", value=value), "damaged") for value in ("x", 5, None, [5], [{}])),
    *(
        (no_entry(HISTORY, "events", 0, name), f"{name}")
        for name in (
            "step",
            "layers",
            "state_sizes_before",
            "state_sizes_after",
            "kept_states",
            "tokens",
            "criterion",
            "loss_after",
        )
    ),
    *((event(step=value), "step = ") for value in ("x", 1.5, [1], NAN, True, -1)),
    *((event(rolled_back_at=value), "rolled_back_at = ") for value in ("x", 1.5, [1], NAN, True, -1)),
    *((event(layers=value), "damaged|malformed") for value in ("x", 5, None, {}, [], [0], [0, 1, 2], [0, 2], [0, -1])),
    *((event(layers=value), "damaged|malformed") for value in ([0, 0], [0, "1"], [0, [1]], [0, None], [False, True])),
    (event(layers=[1, 0]), r"layers = \[1, 0\]"),
    *((event(tokens=value), "tokens = ") for value in ("x", 1.5, [1], NAN, True, -1, None)),
    *((event(**{name: value}), f"{name} = ") for name in NUMBERS for value in ("x", [1.0], NAN, True, 10**400, {})),
    *((event(**{name: None}), f"{name} = ") for name in NUMBERS[:2]),
    (event(loss_before=None), "a loss before or after the cut without the other"),
    *(
        (event(recall_before=value, recall_after=value), "recall_before = ")
        for value in (5, "x", [], {}, {"loss": 1.0}, {"loss": NAN, "accuracy": 0.5}, {"loss": 1.0, "accuracy": 1.5})
    ),
    (event(recall_before={"loss": 1.0, "accuracy": 0.5}), "recall before or after the cut without the other"),
    *((event(criterion=value), "criterion = ") for value in (5, None, ["output"])),
    *((event(compensate=value), "compensate = ") for value in (1, "true", None)),
    *((event(goal=value), "goal = ") for value in (5, "x", [], {"tolerance": "x"}, {"tolerance": NAN})),
    *(
        (event(state_sizes_before=value), "damaged|malformed|knows nothing")
        for value in ("x", 5, [], [16], [16, "16"])
    ),
    *(
        (event(state_sizes_after=value), "malformed")
        for value in ("x", 5, [], [4], [4, 4, 4], [4, 4.0], [0, 4], [-4, 4])
    ),
    *((event(state_sizes_before=value), "malformed") for value in ([16, 16.0], [16, -16], [16, HUGE], [16, True])),
    *(
        (event(kept_states=value), "malformed")
        for value in ("x", 5, [], [[0, 1, 2, 3]], [4, 4], [[0, 1, 2, 3], [0, 1, 2]])
    ),
    *(
        (event(kept_states=[[0, 1, 2, 3], value]), "kept states .* of 16")
        for value in ([0, 1, 2, 16], [0, 1, 2, -1], [0, 1, 2, 2], [0, 1, 2, "3"], [0, 1, 2, 3.0], [0, 1, 2, [3]])
    ),
    *(
        (event(score_discarded=value), "malformed")
        for value in ("x", 5, [], [0.1], [0.1, "x"], [0.1, 1.5], [0.1, -0.5], [0.1, NAN], [0.1, None])
    ),
    *((event(single_layer_loss_change=value), "malformed") for value in ("x", 5, [], [0.1], [0.1, "x"], [0.1, None])),
    (gone(SPECTRA), "hsv.safetensors is missing"),
    (replaced(SPECTRA, lambda path: path.symlink_to("nowhere")), "hsv.safetensors is missing"),
    (replaced(SPECTRA, Path.mkdir), "the history in .* is damaged"),
    (text(SPECTRA, b""), "the history in .* is damaged"),
    (cut(SPECTRA, -1), "the history in .* is damaged"),
    (header({}, length=HUGE, name=SPECTRA), "the history in .* is damaged"),
    (header({SPECTRUM: floats(0, 64, 8), "b": floats(32, 64, 8)}, name=SPECTRA), "the history in .* is damaged"),
    (tensors(lambda content: content.pop(SPECTRUM), SPECTRA), "the history in .* is damaged .*event.0.layer.0"),
    (tensors(lambda c: c.update({"event.1.layer.0": torch.ones(4)}), SPECTRA), "event.1.layer.0.*knows nothing"),
    (spectrum(lambda sigma: sigma[:-1]), "a spectrum of shape .15,."),
    (spectrum(lambda sigma: sigma[None]), "a spectrum of shape .1, 16."),
    (spectrum(lambda sigma: sigma[:0]), "a spectrum of shape .0,."),
    (spectrum(lambda sigma: filled(sigma, NAN)), "NaN or Inf"),
    (spectrum(lambda sigma: filled(sigma, float("inf"))), "NaN or Inf"),
    (spectrum(lambda sigma: -sigma), "a spectrum that is not descending and at least 0"),
    (spectrum(lambda sigma: sigma.flip(0)), "a spectrum that is not descending and at least 0"),
    *(
        (spectrum(lambda s, dtype=dtype: s.to(dtype)), "not float64")
        for dtype in (torch.float32, torch.bool, torch.cfloat)
    ),
)
def test_a_history_that_we_could_not_have_written_is_refused(sound, tmp_path, damage, message):
    refused(sound["uniform"], tmp_path, damage, message, load_history)


def test_what_is_sound_is_read(sound):
    """So that the refusals above are for the damage."""
    assert check_checkpoint(sound["uniform"]) == check_checkpoint(sound["sharded"]) == {0: 4, 1: 4}
    assert check_checkpoint(sound["per_layer"]) == {0: 8, 1: 16}
    for folder in sound.values():
        load_language_model(folder)
    for name in ("uniform", "per_layer", "sharded"):
        load_history(sound[name])
