"""A history records what was measured and cut, and when; it lies in `compressm.json` and `hsv.safetensors`.

`compressm.json` is readable without this library. What is said of single layers is in lists beside `layers`, the
indices of the layers that have a state. The spectra, float64, (N,), descending, are in `hsv.safetensors`, named by
layer index: `event.<i>.layer.<index>` belongs to the i-th entry of `events`, `observation.<i>.layer.<index>` to the
i-th entry of `observations`; `observation.<i>.scores.<index>` are scores in stored order, where rankings are compared.
The model's own `config.json` gets a summary, under `compressm`. The format is documented in docs/file-format.md.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .files import read_json, write_aside, write_json
from .records import Observation, ReductionEvent, from_record, to_record

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"  # of a model that Transformers saved
SUMMARY = "compressm"
HISTORY_FILE = "compressm.json"
SPECTRA_FILE = "hsv.safetensors"
TENSOR_NAMES = {"hankel_singular_values": "layer", "scores": "scores"}  # of a record → in the tensor file
RECORDS = {"events": "event", "observations": "observation"}  # kind in the JSON → name in the tensor file


@dataclass
class History:
    """A history keeps all events and observations of a run, in order, with the configuration behind them.

    All of them have the same layers: those of the model that have a state.
    """

    config: dict
    schedule: dict | None = None
    events: list[ReductionEvent] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    library_version: str = field(default_factory=partial(version, "hf_compressm"))

    @property
    def layers(self) -> list[int]:
        """Return the indices of the layers that have a state, ascending; none before anything was recorded."""
        recorded = [*self.events, *self.observations]
        return recorded[0].layers if recorded else []

    @property
    def standing_cuts(self) -> list[ReductionEvent]:
        """Return the events that removed states and were not undone."""
        return [event for event in self.events if event.is_cut and event.rolled_back_at is None]

    @property
    def loss_spent(self) -> float:
        """Return what all cuts that stand added to the loss, nats per prediction; one that lowered it counts as 0."""
        measured = [event for event in self.standing_cuts if event.loss_before is not None]
        return sum(max(0.0, event.loss_after - event.loss_before) for event in measured)

    @property
    def state_sizes(self) -> dict[int, int] | None:
        """Return N after all events and rollbacks, by layer index; None before the first event."""
        if not self.events:
            return None
        last, last_rollback = self.events[-1], self.last_rollback
        if last_rollback == 0 or last.step is None or last.step > last_rollback:  # None: after training
            return last.by_layer("state_sizes_after")
        undone = next(event for event in self.events if event.rolled_back_at == last_rollback)
        return undone.by_layer("state_sizes_before")

    @property
    def rollbacks(self) -> int:
        """Return how often the model went back to before a cut."""
        return len({event.rolled_back_at for event in self.events} - {None})

    @property
    def last_rollback(self) -> int:
        """Return the step of the last rollback; 0 before the first."""
        return max((event.rolled_back_at or 0 for event in self.events), default=0)

    @property
    def observations_since_rollback(self) -> list[Observation]:
        """Return the observations since the last rollback; earlier ones may be of a model that was taken back."""
        return [seen for seen in self.observations if seen.step > self.last_rollback]

    @property
    def steps(self) -> list[int | None]:
        """Return the step of each event."""
        return [event.step for event in self.events]

    @property
    def score_kept(self) -> dict[int, float]:
        """Return the share of the scores that all cuts together kept, each measured before its cut, by layer index."""
        discarded = [event.by_layer("score_discarded") for event in self.standing_cuts]
        return {layer: math.prod(1 - shares[layer] for shares in discarded) for layer in self.layers}

    def summary(self) -> dict | None:
        """Return the summary for `config.json`, of JSON types only; None where no cut stands."""
        cuts = self.standing_cuts
        if not cuts:
            return None
        return {
            "format_version": FORMAT_VERSION,
            "library_version": self.library_version,
            "criterion": cuts[-1].criterion,
            "compensate": cuts[-1].compensate,
            "refit": any(cut.refit for cut in cuts),
            "goals": [cut.goal for cut in cuts],
            "steps": [cut.step for cut in cuts],
            "layers": self.layers,
            "state_sizes_before": cuts[0].state_sizes_before,
            "state_sizes_after": cuts[-1].state_sizes_after,
            "score_kept": list(self.score_kept.values()),
        }

    def to_dict(self) -> dict:
        """Return the history in JSON types only; spectra are lists in it."""
        return {
            "format_version": FORMAT_VERSION,
            "library_version": self.library_version,
            "config": self.config,
            "schedule": self.schedule,
            "events": [to_record(event) for event in self.events],
            "observations": [to_record(observation) for observation in self.observations],
        }

    @classmethod
    def from_dict(cls, content: dict) -> "History":
        """Return the history that `to_dict` made this content from.

        Raises:
            ValueError: the content is no history, or one of a later format.
        """
        try:
            format_version = content["format_version"]
            if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
                raise ValueError(
                    f"history format {format_version!r} is not known; readable up to {FORMAT_VERSION}: upgrade "
                    "hf_compressm."
                )
            history = cls(
                config=content["config"],
                schedule=content["schedule"],
                events=[from_record(ReductionEvent, record) for record in content["events"]],
                observations=[from_record(Observation, record) for record in content.get("observations", [])],
                library_version=content["library_version"],
            )
            for name, allowed in (("config", dict), ("schedule", dict | None), ("library_version", str)):
                if not isinstance(getattr(history, name), allowed):
                    raise TypeError(f"{name} = {getattr(history, name)!r} is not allowed")
            for record in [*history.events, *history.observations]:
                if record.layers != history.layers:
                    raise TypeError(f"there is a record of the layers {record.layers} beside one of {history.layers}")
            return history
        except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"this is a malformed history ({type(error).__name__}: {error}); it was not written by this library."
            ) from error


def save_history(history: History, folder: str | Path) -> None:
    """Write `compressm.json` and `hsv.safetensors` into `folder`, each aside first and then renamed.

    Where a model's `config.json` lies there, its summary is brought up to date.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content, spectra = history.to_dict(), {}
    for kind in RECORDS:
        for i, record in enumerate(content[kind]):
            for name, word in TENSOR_NAMES.items():
                measured = record.pop(name, None)
                for index, values in zip(record["layers"], measured, strict=True) if measured is not None else ():
                    spectra[f"{RECORDS[kind]}.{i}.{word}.{index}"] = torch.tensor(values, dtype=torch.float64)
    write_aside(folder / SPECTRA_FILE, lambda path: save_file(spectra, path, {"format": "pt"}))
    write_json(folder / HISTORY_FILE, content)
    if (folder / CONFIG_NAME).is_file():
        config, summary = read_json(folder / CONFIG_NAME), history.summary()
        if config.get(SUMMARY) != summary:
            others = {name: value for name, value in config.items() if name != SUMMARY}
            write_json(folder / CONFIG_NAME, others | ({SUMMARY: summary} if summary else {}))


def load_history(folder: str | Path) -> History:
    """Read what `save_history` wrote.

    Raises:
        FileNotFoundError: there is no history in the folder.
        ValueError: a file is damaged, or the two do not belong together.
    """
    folder = Path(folder)
    content = read_json(folder / HISTORY_FILE)
    try:
        spectra = load_file(folder / SPECTRA_FILE)
        for kind in RECORDS:
            for i, record in enumerate(content.get(kind, [])):
                for name, word in TENSOR_NAMES.items():
                    keys = [f"{RECORDS[kind]}.{i}.{word}.{index}" for index in record["layers"]]
                    if word == "layer" or keys[0] in spectra:
                        record[name] = [spectra.pop(key) for key in keys]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder / SPECTRA_FILE} is missing; take the history from another checkpoint."
        ) from error
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the history in {folder} is damaged ({error}); take it from another checkpoint.") from error
    if spectra:
        raise ValueError(f"{SPECTRA_FILE} in {folder} holds {sorted(spectra)}, of which {HISTORY_FILE} knows nothing.")
    try:
        return History.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{folder / HISTORY_FILE}: {error}") from error
