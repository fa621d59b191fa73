"""Real text, a real tokenizer, a small Mamba: what the tests share."""

import importlib.util
import json
import os
import random
import shutil
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing from more; two workers share two cores
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # of TRL; read when huggingface_hub is imported
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels on a CPU; read when triton is imported

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_model
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_compressm import (
    CompreSSMConfig,
    LRUConfig,
    LRUForSequenceClassification,
    analyze,
    compress,
    install_scan,
    parameter_groups,
    uninstall_scan,
)
from hf_compressm.architectures import state_layers
from hf_compressm.storage.history import History, save_history

ROOT = Path(__file__).parent.parent
LONGEST_FIRST = ("test_scripts.py", "test_distributed.py", "test_studies.py", "test_kill.py")  # a worker takes a file
VOCABULARY, LENGTH, LAYERS, STATE_SIZE = 512, 32, 2, 16
# Where the models of the tests come from. Users load theirs, and a config that was loaded has attributes that a fresh
# one has not. "loaded": saved, then `from_pretrained`; "built"; "bf16": saved in bfloat16, loaded in float32 to train.
MODEL_ORIGIN = os.environ.get("MODEL_ORIGIN", "loaded")
SAVED_MODELS = TemporaryDirectory()  # of this process
FADING = {"r_min": 0.0, "r_max": 0.9}  # |λ| of an LRU
pytest_plugins = ["delay_task", "hub_fixtures", "settling_fixtures"]  # of tests, tests/sharing, tests/training


def pytest_collection_modifyitems(items):
    """The files that launch processes come first, so that no worker is left alone with one of them at the end."""
    order = dict(zip(reversed(LONGEST_FIRST), range(len(LONGEST_FIRST)), strict=True))
    items.sort(key=lambda item: -order.get(item.path.name, -1))


@pytest.fixture(autouse=True)
def installed_scan():
    """Every test starts and ends with the scan installed by one test and no longer."""
    install_scan()
    yield
    uninstall_scan()


@pytest.fixture(scope="session")
def verses() -> list[str]:
    folder = Path(importlib.util.find_spec("bible").submodule_search_locations[0])
    with open(folder / "data" / "kjv.jsonl") as lines:
        return [json.loads(next(lines))["text"] for _ in range(2000)]


@pytest.fixture(scope="session")
def blocks(verses) -> torch.Tensor:
    """Tokens of real text, (blocks, L)."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(verses, vocab_size=VOCABULARY, show_progress=False)
    ids = torch.tensor(tokenizer.encode("\n".join(verses)).ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@pytest.fixture(scope="session")
def dataset(blocks) -> Dataset:
    return Dataset.from_dict({"input_ids": blocks.tolist(), "labels": blocks.tolist()})


@pytest.fixture
def batches(blocks) -> list[dict]:
    """Ten batches of eight sequences."""
    return [{"input_ids": blocks[8 * i : 8 * i + 8], "labels": blocks[8 * i : 8 * i + 8]} for i in range(10)]


def from_origin(build):
    """Let a builder give its model as `MODEL_ORIGIN` says; the random numbers go on as after the building."""
    saved = {}

    @wraps(build)
    def give(seed: int = 0, **changes) -> PreTrainedModel:
        if MODEL_ORIGIN == "built":
            return build(seed, **changes)
        key = repr((seed, changes))
        if key not in saved:
            model, folder = build(seed, **changes), Path(SAVED_MODELS.name, f"{build.__name__}-{len(saved)}")
            _save(model.bfloat16() if MODEL_ORIGIN == "bf16" else model, folder)
            saved[key] = type(model), folder, torch.get_rng_state()
        kind, folder, random_numbers = saved[key]
        set_seed(seed)
        model = kind.from_pretrained(folder, dtype=torch.float32)
        torch.set_rng_state(random_numbers)
        return model

    return give


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    if not (folder / SAFE_WEIGHTS_NAME).exists():  # of several processes only the first writes files
        model.config.save_pretrained(folder)
        save_model(model, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})


@from_origin
def build_model(seed: int = 0, **changes) -> MambaForCausalLM:
    set_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, state_size=STATE_SIZE, num_hidden_layers=LAYERS)
    return MambaForCausalLM(MambaConfig(**(sizes | changes)))


@torch.no_grad()
def with_states_that_count(model: PreTrainedModel) -> PreTrainedModel:
    """The model with larger projections: with those of the initialiser states hardly matter."""
    for name, parameter in model.named_parameters():
        if "in_proj" in name or "out_proj" in name:
            parameter *= 4
    return model


@from_origin
def build_lru(seed: int = 0, **changes) -> LRUForSequenceClassification:
    """A small model of tokens; nothing in it is still at a neutral value of the initialiser."""
    set_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=12, state_size=16, num_hidden_layers=2, num_labels=2)
    model = LRUForSequenceClassification(LRUConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def label_of(blocks: torch.Tensor) -> torch.Tensor:
    """Whether a rare token often follows a rare token: to tell, a layer has to remember."""
    rare = blocks > blocks.float().median()
    return ((rare[:, 1:] & rare[:, :-1]).sum(1) > 7).long()


def train_steps(model, optimizer, batches) -> list[float]:
    """Plain training steps, one for each batch; the losses."""
    model.train()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def trained(batches):
    """(model, optimizer) after a few real steps, so that states and moments are not those of the initialiser."""
    model = build_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)
    train_steps(model, optimizer, batches)
    return model, optimizer


@pytest.fixture(scope="session")
def learned(blocks) -> dict[str, torch.Tensor]:
    """Weights of a model trained long enough for its states to matter."""
    install_scan()
    model = build_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=5e-3)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).split(8)[:200]
    train_steps(model, optimizer, [{"input_ids": blocks[i], "labels": blocks[i]} for i in order])
    return weights_of(model)


@pytest.fixture(scope="session")
def labelled(blocks) -> Dataset:
    """Sequences to classify, for an LRU."""
    return Dataset.from_dict({"input_ids": blocks[:1000].tolist(), "labels": label_of(blocks)[:1000].tolist()})


@pytest.fixture(scope="session")
def lru_batches(blocks) -> list[dict]:
    """Ten labelled batches of sixteen, the first one shorter."""
    labels = label_of(blocks)
    return [{"input_ids": blocks[i], "labels": labels[i]} for i in torch.arange(6, 160).split([10] + [16] * 9)]


@pytest.fixture(scope="session")
def learned_lru(blocks) -> dict[str, torch.Tensor]:
    """Trained until the loss depends on the states; then some states of the first layer are made weak."""
    model, labels = build_lru(hidden_dropout_prob=0.0, **FADING), label_of(blocks)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).split(16)[:150]
    batches = [{"input_ids": blocks[i], "labels": labels[i]} for i in order]
    train_steps(model, torch.optim.AdamW(model.parameters(), lr=2e-2), batches)
    model.model.layers[0].mixer.C.data[:, 10:] *= 0.01
    return weights_of(model)


@pytest.fixture
def lru(learned_lru) -> LRUForSequenceClassification:
    model = build_lru(**FADING)
    model.load_state_dict(learned_lru)
    return model.eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory, verses, blocks) -> Path:
    """`text.txt`, and saved models: `whole`, and with their histories `uniform` (N = 4) and `per_layer`."""
    install_scan()
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text("\n\n".join(verses))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(verses, vocab_size=VOCABULARY - 1, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>")
    batches = [{"input_ids": each, "labels": each} for each in blocks[:240].split(8)]
    for name, options in (
        ("whole", None),
        ("uniform", {"target_state_size": 4}),
        ("per_layer", {"cut_fraction": 0.5, "allocation": "per_layer", "skip_layers": [1]}),
    ):
        model = build_model()
        train_steps(model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3), batches)
        if options is not None:
            config = CompreSSMConfig(calibration_batches=4, **options)
            save_history(History({}, events=[compress(model, analyze(model, batches, config))]), folder / name)
        if MODEL_ORIGIN == "bf16":
            model.bfloat16()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that lies in a folder: path → bytes of a file, or whether it is a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if is_plain else str(path.is_symlink())
    return found


def copy_of(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, symlinks=True))


def recorded_operators(model, ids: torch.Tensor) -> list[str]:
    """What torch.compile hands to its backend, in one graph, for a forward pass."""
    operators = []

    def record(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=record, fullgraph=True)(ids, use_cache=False)
    return operators


def build_trainer(folder, dataset, callbacks=(), model=None, eval_dataset=None, **changes) -> Trainer:
    options = dict(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        model=build_model() if model is None else model,
        args=TrainingArguments(**(options | changes)),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


def losses_of(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def systems_of(model) -> list[tuple[torch.Tensor, ...]]:
    """(eigenvalues, B, C) of each layer of an LRU."""
    return [tuple(tensor.clone() for tensor in mixer.system()) for mixer in state_layers(model).values()]


def random_state() -> tuple:
    """Of all generators that a training could draw from."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def assert_identical(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
