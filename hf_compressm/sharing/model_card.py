"""This module writes the card of a reduced language model from its folder and `templates/model_card.md`."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import CONFIG_NAME

from ..architectures.registry import FAMILIES
from ..report import LOSS_UNIT, cuts_table, loss_text
from ..storage.checkpoint import check_checkpoint, state_tensor_shapes, weight_shapes
from ..storage.files import read_json, write_aside
from ..storage.history import History, load_history
from ..storage.records import sizes_text
from .pictures import PICTURES

CARD = "README.md"
TAGS = ("compressm", "mamba", "state-space-model")
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


def write_model_card(folder: str | Path, repo_id: str, details: CardDetails | None = None) -> ModelCard:
    """Write `README.md` beside a reduced language model and its history.

    Raises:
        FileNotFoundError: the folder holds no model or no history.
        ValueError: the model is not a language model, or a file is damaged.
    """
    folder, details = Path(folder), details or CardDetails()
    sizes, history = check_checkpoint(folder), load_history(folder)
    check_language_model(folder)
    template = files(__package__).joinpath("templates/model_card.md").read_text(encoding="utf-8")
    name = details.name or repo_id.rpartition("/")[2]
    facts = _facts(folder, sizes, history) | _results(details, history) | _cuts(history)
    pictures = {f"has_{Path(picture).stem.split('_')[-1]}": (folder / picture).exists() for picture in PICTURES}
    card = ModelCard.from_template(
        _card_data(details, name),
        template_str=template,
        name=_as_markdown(name),
        repo_in_python=json.dumps(repo_id, ensure_ascii=False),
        repo_in_shell=shlex.quote(repo_id),
        loss_unit=LOSS_UNIT,
        **facts,
        **pictures,
    )
    write_aside(folder / CARD, card.save)
    return card


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


def _facts(folder: Path, sizes: dict[int, int], history: History) -> dict:
    """Return sizes, parameters and bytes of state, before and after, as texts by the template's names."""
    config, cuts, before, live = read_json(folder / CONFIG_NAME), history.standing_cuts, sizes, sizes
    if cuts:
        before, live = cuts[0].by_layer("state_sizes_before"), cuts[-1].by_layer("state_sizes_after")
    family = FAMILIES[config["model_type"]]
    parameters = sum(math.prod(shape) for shape in weight_shapes(folder).values())
    removed = sum(
        family.parameters_per_state(shapes) * (before[index] - sizes[index])
        for index, shapes in state_tensor_shapes(folder, family).items()
    )
    state_bytes = 4 * family.values_per_state(config)
    return {
        "title": family.title,
        "limits": family.limits,
        "plain_class": config["architectures"][0],
        "sizes_before": sizes_text(before.values()),
        "sizes_after": sizes_text(live.values())
        + (f" (padded to {sizes_text(sizes.values())})" if sizes != live else ""),
        "is_uniform": len(set(sizes.values())) == 1,
        "parameters_before": f"{(parameters + removed) / 1e6:.2f} M",
        "parameters_after": f"{parameters / 1e6:.2f} M",
        "state_before": _bytes_text(state_bytes * sum(before.values())),
        "state_after": _bytes_text(state_bytes * sum(sizes.values())),
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
