"""This module writes the card of a reduced language model, in a folder or in memory, by `templates/model_card.md`."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers.utils import CONFIG_NAME

from ..architectures import state_layers
from ..architectures.family import Family
from ..architectures.registry import FAMILIES
from ..architectures.remote_code import needs_code
from ..architectures.scalar_decay.family import ScalarDecayFamily
from ..engines import original_class, unwrap
from ..report import LOSS_UNIT, cuts_table, loss_text
from ..storage.checkpoint import check_checkpoint, state_tensor_shapes, weight_shapes
from ..storage.files import read_json, write_aside
from ..storage.history import History, load_history
from ..storage.mamba_ssm_format import is_written
from ..storage.records import sizes_text
from .pictures import PICTURES

CARD = "README.md"
STATE_DTYPE, CONVOLUTION_DTYPE = torch.float32, torch.bfloat16  # in which a server keeps them, as the card counts
TAGS = ("compressm", "mamba", "state-space-model")
SECTION = "The state of this model"  # our title below a card that somebody else's code wrote
# These lines mark a card that nobody wrote by hand: ours, and Trainer's, which asks whoever completes it to go.
WRITTEN_BY = ("<!-- written by hf_compressm", "<!-- This model card has been generated automatically according to")


@dataclass
class CardDetails:
    """These details say what the files of a model do not.

    Attributes:
        name: the title; the repository's name by default.
        license: its identifier on the Hub, such as "apache-2.0".
        base_model: the name on the Hub of the model that was reduced after its training.
        datasets: the names on the Hub of what it was trained on.
        language: its languages, as ISO codes.
        tags: tags beside those of every reduced model.
        eval_results: results for the `model-index` of the card.
        log_history: the log of the Trainer, with the loss, evaluation loss and tokens per second.
    """

    name: str | None = None
    license: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    eval_results: Sequence[EvalResult] = ()
    log_history: Sequence[dict] = field(default=(), repr=False)

    def __post_init__(self):
        for name in ("datasets", "language", "tags"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])


@dataclass(frozen=True)
class ReducedModel:
    """This is what a card counts of a reduced model, whether it lies in a folder or in memory.

    Attributes:
        family: the family of its architecture.
        class_name: the name of its class.
        config: the content of its `config.json`.
        state_sizes: N by layer index.
        parameters: how many parameters it has.
        shapes: those of the state tensors, by layer index and path.
        history: the history of its reduction.
    """

    family: Family
    class_name: str
    config: dict
    state_sizes: dict[int, int]
    parameters: int
    shapes: dict[int, dict[str, tuple[int, ...]]]
    history: History

    @classmethod
    def in_folder(cls, folder: Path) -> "ReducedModel":
        """Read the headers of a checkpoint, and the history beside it.

        Raises:
            FileNotFoundError: the folder holds no model or no history.
            ValueError: the model is not a language model, or a file is damaged.
        """
        sizes, history, config = check_checkpoint(folder), load_history(folder), read_json(folder / CONFIG_NAME)
        check_language_model(folder)
        family = FAMILIES[config["model_type"]]
        shapes = state_tensor_shapes(folder, family)
        parameters = sum(math.prod(shape) for shape in weight_shapes(folder).values())
        return cls(family, config["architectures"][0], config, sizes, parameters, shapes, history)

    @classmethod
    def in_memory(cls, model: nn.Module, history: History) -> "ReducedModel":
        """Ask a model as Trainer has it; nothing is gathered."""
        layers = state_layers(unwrap(model))
        family, model = layers.family, layers.model
        shapes = {index: {path: tuple(p.shape) for path, p in layers.parameters(index).items()} for index in layers}
        parameters = sum(math.prod(parameter.shape) for parameter in model.parameters())
        name, config = original_class(model).__name__, model.config.to_dict()
        return cls(family, name, config, layers.sizes, parameters, shapes, history)

    def cache_bytes(self, sizes: dict[int, int]) -> tuple[int, int]:
        """Return the bytes that a sequence carries at these sizes: of states, and of past inputs of convolutions."""
        values = self.family.values_per_state(self.config) * sum(sizes.values())
        inputs = sum(self.family.convolution_values(self.config, size) for size in sizes.values())
        return values * STATE_DTYPE.itemsize, inputs * CONVOLUTION_DTYPE.itemsize

    def removed_parameters(self, before: dict[int, int]) -> int:
        """Return how many parameters the model has lost since it had these sizes; fewer than 0 where it has more."""
        return sum(
            self.family.removed_parameters(shapes, self.config, before[index] - self.state_sizes[index])
            for index, shapes in self.shapes.items()
        )


def write_model_card(
    folder: str | Path,
    repo_id: str,
    details: CardDetails | None = None,
    model: ReducedModel | None = None,
    below: bool = False,
) -> ModelCard:
    """Write the `README.md` of a reduced language model.

    Where a card lies there that our own section was once put below, only that section is written anew.

    Args:
        folder: where it is written; the card shows the pictures that lie there.
        repo_id: the model's name on the Hub.
        details: what the card says beside the history.
        model: what the card counts; by default it is read from the folder, where the history lies beside the weights.
        below: whether the card that lies there, such as one of a trainer's own, stays above our section. Metadata that
            both have are joined, or ours.

    Raises:
        FileNotFoundError: the folder holds no model or no history.
        ValueError: the model is not a language model, or a file is damaged.
    """
    folder, details = Path(folder), details or CardDetails()
    model = model or ReducedModel.in_folder(folder)
    path, name = folder / CARD, details.name or repo_id.rpartition("/")[2]
    below = below or (path.exists() and f"\n# {SECTION}\n" in path.read_text("utf-8", "replace"))
    pictures = {f"has_{Path(picture).stem.split('_')[-1]}": (folder / picture).exists() for picture in PICTURES}
    card = ModelCard.from_template(
        _card_data(details, name),
        template_str=files(__package__).joinpath("templates/model_card.md").read_text(encoding="utf-8"),
        title=SECTION if below else _as_markdown(name),
        repo_in_python=json.dumps(repo_id, ensure_ascii=False),
        repo_in_shell=shlex.quote(repo_id),
        loss_unit=LOSS_UNIT,
        **_facts(model),
        **_results(details, model.history),
        **_cuts(model.history),
        **pictures,
    )
    if below:
        card = _joined(ModelCard.load(path), card)
    write_aside(path, card.save)
    return card


def _joined(above: ModelCard, card: ModelCard) -> ModelCard:
    """Return the upper card with the other one below it, in the place of a section that was written before."""
    for name, value in vars(card.data).items():
        if name in ("tags", "datasets", "language"):
            given = above.data.get(name) or []
            value = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *(value or [])]))
        if value:
            above.data[name] = value
    own_text = above.text.partition(f"\n# {SECTION}\n")[0].rstrip()
    above.text = f"{own_text}\n\n{card.text.lstrip()}"
    return above


def check_language_model(folder: Path) -> None:
    """Refuse a model for which there is no card.

    Raises:
        ValueError: the model is not a language model.
    """
    model_type = read_json(folder / CONFIG_NAME)["model_type"]
    if not FAMILIES[model_type].is_language_model:
        raise ValueError(f"{folder} holds a model of type '{model_type}'; cards are for language models.")


def check_details(details: CardDetails) -> None:
    """Let the Hub say whether it would take a card with these details.

    Raises:
        ValueError: the Hub would refuse it; the message says why.
    """
    ModelCard(f"---\n{_card_data(details, details.name or 'model')}\n---\n").validate()


def may_be_written(path: Path) -> bool:
    """Say whether a card may be written anew: there is none, or we or Trainer wrote it."""
    return not path.exists() or any(mark in path.read_text("utf-8", "replace") for mark in WRITTEN_BY)


def _as_markdown(text: str) -> str:
    """Return Markdown that shows this text as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", text)


def _card_data(details: CardDetails, name: str) -> ModelCardData:
    return ModelCardData(
        model_name=name if details.eval_results else None,
        license=details.license,
        base_model=details.base_model,
        datasets=list(details.datasets) or None,
        language=list(details.language) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *details.tags])),
        eval_results=list(details.eval_results) or None,
    )


def _facts(model: ReducedModel) -> dict:
    """Return sizes, parameters and bytes of state, before and after, as texts by the template's names."""
    history, sizes = model.history, model.state_sizes
    cuts, before, live = history.standing_cuts, sizes, sizes
    if cuts:
        before, live = cuts[0].by_layer("state_sizes_before"), cuts[-1].by_layer("state_sizes_after")
    state_before, inputs_before = model.cache_bytes(before)
    state_after, inputs_after = model.cache_bytes(sizes)
    return {
        "architecture": model.family.title,
        "limits": model.family.limits,
        "plain_class": model.class_name,
        "sizes_before": sizes_text(before.values()),
        "sizes_after": sizes_text(live.values())
        + (f" (padded to {sizes_text(sizes.values())})" if sizes != live else ""),
        "needs_code": needs_code(model.class_name),
        "is_balanced": "axis" not in model.family.bases,
        "has_groups": isinstance(model.family, ScalarDecayFamily),
        "has_attention": "num_attention_heads" in model.config,
        "mamba_ssm_reads_it": is_written(model.config["model_type"]),
        "parameters_before": f"{(model.parameters + model.removed_parameters(before)) / 1e6:.2f} M",
        "parameters_after": f"{model.parameters / 1e6:.2f} M",
        "state_before": _bytes_text(state_before),
        "state_after": _bytes_text(state_after),
        "inputs_before": _bytes_text(inputs_before) if inputs_after else None,
        "inputs_after": _bytes_text(inputs_after),
        "times_as_many": f"{(state_before + inputs_before) / (state_after + inputs_after):.1f}",
        "configuration": json.dumps({"config": history.config, "schedule": history.schedule}, indent=2),
        "library_version": history.library_version,
    }


def _cuts(history: History) -> dict:
    """Return what was cut, how the other states made up for it, and what it cost."""
    cuts = history.standing_cuts
    measured = bool(cuts) and cuts[0].loss_before is not None
    return {
        "cuts": cuts_table(cuts).as_markdown() if cuts else None,
        "in_training": any(cut.step is not None for cut in cuts),
        "compensate": any(cut.compensate for cut in cuts),
        "refit": any(cut.refit for cut in cuts),
        "loss_before": loss_text(cuts[0].loss_before) if measured else None,
        "loss_after": loss_text(cuts[-1].loss_after) if measured else None,
    }


def _results(details: CardDetails, history: History) -> dict:
    """Return the last evaluation of a Trainer's log, and the speed up to the first cut and after the last."""
    losses = [entry["eval_loss"] for entry in details.log_history if "eval_loss" in entry]
    steps = [cut.step for cut in history.standing_cuts if cut.step is not None]
    rates = [entry for entry in details.log_history if "tokens_per_second" in entry and steps]
    before = [entry["tokens_per_second"] for entry in rates if entry["step"] <= steps[0]]
    after = [entry["tokens_per_second"] for entry in rates if entry["step"] > steps[-1]]
    return {
        "evaluation_loss": loss_text(losses[-1]) if losses else None,
        "tokens_per_second": [f"{before[0]:,.0f}", f"{after[-1]:,.0f}"] if before and after else None,
    }


def _bytes_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if count >= 10 or unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
