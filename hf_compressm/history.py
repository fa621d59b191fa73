"""What was measured and cut, when, and with which Hankel singular values: `compressm.json` and `hsv.safetensors`.

`compressm.json` is readable without this library. The spectra, float64, (N,), descending, stand beside it in
`hsv.safetensors`: `event.<i>.layer.<j>` belongs to the i-th entry of `events`, `observation.<i>.layer.<j>` to the i-th
entry of `observations`, layer j. The model's own `config.json` gets a summary, under `compressm`. The format is
documented in the README.
"""

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import read_json, write_aside, write_json

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"  # of a model that Transformers saved
SUMMARY = "compressm"
HISTORY_FILE = "compressm.json"
SPECTRA_FILE = "hsv.safetensors"
RECORDS = {"events": "event", "observations": "observation"}  # kind in the JSON → name in the tensor file


@dataclass
class ReductionEvent:
    """One analysis and what came of it; lists have an entry per layer.

    Attributes:
        step: optimizer steps done; None outside a training run.
        state_sizes_before, state_sizes_after: N; equal where nothing was cut.
        keep: kept states, positions before the cut.
        energy_discarded: share of the state energy that was dropped, by the criterion.
        predicted_loss_change: by cutting this layer alone, on one calibration batch; nats per prediction. None, like
            the losses, where no batches were given.
        loss_before, loss_after: measured on the calibration batches held out, nats per prediction.
        tokens: calibration tokens behind the statistics.
        seconds: time of the analysis and the surgery; in Trainer, of the whole event.
        measuring_seconds: the part of it that went into measuring losses.
        criterion, compensate: how states were ranked and made up for.
        hankel_singular_values: spectrum before the cut, (N,), descending.
        rolled_back_at: optimizer steps done when the cut was undone; None while it stands.
        goal: what this event was to achieve: the name of the goal and its value.
    """

    step: int | None
    state_sizes_before: list[int]
    state_sizes_after: list[int]
    keep: list[list[int]]
    energy_discarded: list[float]
    predicted_loss_change: list[float] | None
    loss_before: float | None
    loss_after: float | None
    tokens: int
    seconds: float
    measuring_seconds: float
    criterion: str
    compensate: bool
    hankel_singular_values: list[Tensor] = field(repr=False)
    rolled_back_at: int | None = None
    goal: dict[str, float] | None = None

    @property
    def is_cut(self) -> bool:
        """Whether anything was removed."""
        return self.state_sizes_before != self.state_sizes_after


@dataclass
class Observation:
    """The singular values at one point of training, and how far they came since the last; lists: one entry per layer.

    Attributes:
        step: optimizer steps done.
        state_sizes: N.
        movement: max_i |σ_i' - σ_i| since the observation before it; None at the first, and where a cut lies between.
        weyl_bound: what Weyl's theorem allows it to be, ‖H' - H‖; None where layers have no Gramians of their own, and
            at the first observation after a resume.
        seconds: time of the measurement.
        hankel_singular_values: spectrum, (N,), descending.
    """

    step: int
    state_sizes: list[int]
    movement: list[float] | None
    weyl_bound: list[float] | None
    seconds: float
    hankel_singular_values: list[Tensor] = field(repr=False)

    def share(self, distances: list[float]) -> list[float]:
        """Each layer's distance as a share of its σ_1."""
        largest = [max(float(spectrum[0]), 1e-300) for spectrum in self.hankel_singular_values]
        return [distance / sigma for distance, sigma in zip(distances, largest, strict=True)]


@dataclass
class History:
    """All events and observations of a run, in order, with the configuration behind them."""

    config: dict
    schedule: dict | None = None
    events: list[ReductionEvent] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    library_version: str = field(default_factory=partial(version, "hf_compressm"))

    @property
    def standing_cuts(self) -> list[ReductionEvent]:
        """The events that removed something and were not undone."""
        return [event for event in self.events if event.is_cut and event.rolled_back_at is None]

    @property
    def loss_spent(self) -> float:
        """Rise of the measured loss by all cuts that stand, nats per token; one that lowered it earns nothing back."""
        measured = [event for event in self.standing_cuts if event.loss_before is not None]
        return sum(max(0.0, event.loss_after - event.loss_before) for event in measured)

    @property
    def state_sizes(self) -> list[int] | None:
        """The sizes after all events and rollbacks, per layer; None before the first event."""
        if not self.events:
            return None
        last_rollback = max((event.rolled_back_at or 0 for event in self.events), default=0)
        if last_rollback == 0 or self.events[-1].step > last_rollback:
            return self.events[-1].state_sizes_after
        return next(event for event in self.events if event.rolled_back_at == last_rollback).state_sizes_before

    @property
    def rollbacks(self) -> int:
        """How often the model went back to before a cut."""
        return len({event.rolled_back_at for event in self.events} - {None})

    @property
    def steps(self) -> list[int | None]:
        """The steps of the events."""
        return [event.step for event in self.events]

    @property
    def energy_kept(self) -> list[float]:
        """Per layer: the share of the state energy that all cuts together kept, each as measured before it."""
        shares = [[1 - share for share in event.energy_discarded] for event in self.standing_cuts]
        return [math.prod(layer) for layer in zip(*shares, strict=True)]

    def summary(self) -> dict | None:
        """What stands in `config.json`; None where no cut stands. JSON types only."""
        cuts = self.standing_cuts
        if not cuts:
            return None
        return {
            "format_version": FORMAT_VERSION,
            "library_version": self.library_version,
            "criterion": cuts[-1].criterion,
            "compensate": cuts[-1].compensate,
            "goals": [cut.goal for cut in cuts],
            "steps": [cut.step for cut in cuts],
            "state_sizes_before": cuts[0].state_sizes_before,
            "state_sizes_after": cuts[-1].state_sizes_after,
            "energy_kept": self.energy_kept,
        }

    def to_dict(self) -> dict:
        """JSON types only, spectra included as lists."""
        return {
            "format_version": FORMAT_VERSION,
            "library_version": self.library_version,
            "config": self.config,
            "schedule": self.schedule,
            "events": [_record(event) for event in self.events],
            "observations": [_record(observation) for observation in self.observations],
        }

    @classmethod
    def from_dict(cls, content: dict) -> "History":
        """The inverse of `to_dict`.

        Raises:
            ValueError: not a history, or one of a later format.
        """
        try:
            format_version = content["format_version"]
            if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
                raise ValueError(
                    f"history format {format_version!r}; readable up to {FORMAT_VERSION}: upgrade hf_compressm."
                )
            return cls(
                config=content["config"],
                schedule=content["schedule"],
                events=[_from_record(ReductionEvent, record) for record in content["events"]],
                observations=[_from_record(Observation, record) for record in content.get("observations", [])],
                library_version=content["library_version"],
            )
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"malformed history ({type(error).__name__}: {error}); it was not written by this library."
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
            for j, spectrum in enumerate(record.pop("hankel_singular_values")):
                spectra[f"{RECORDS[kind]}.{i}.layer.{j}"] = torch.tensor(spectrum, dtype=torch.float64)
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
                layers = range(len(record["state_sizes_before" if kind == "events" else "state_sizes"]))
                record["hankel_singular_values"] = [spectra.pop(f"{RECORDS[kind]}.{i}.layer.{j}") for j in layers]
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the history in {folder} is damaged ({error}); take it from another checkpoint.") from error
    if spectra:
        raise ValueError(f"{SPECTRA_FILE} in {folder} holds {sorted(spectra)}, of which {HISTORY_FILE} knows nothing.")
    return History.from_dict(content)


def _record(entry: ReductionEvent | Observation) -> dict:
    """JSON types only."""
    return asdict(entry) | {"hankel_singular_values": [spectrum.tolist() for spectrum in entry.hankel_singular_values]}


def _from_record(kind: type, record: dict) -> ReductionEvent | Observation:
    given = {f.name: record[f.name] for f in fields(kind) if f.name in record or f.default is MISSING}
    entry = kind(**given)
    spectra = entry.hankel_singular_values
    entry.hankel_singular_values = [torch.as_tensor(spectrum, dtype=torch.float64) for spectrum in spectra]
    _check_record(entry)
    return entry


def _check_record(entry: ReductionEvent | Observation) -> None:
    """Refuse what could only come from elsewhere: everything is per layer, sizes are counts, spectra fit them."""
    is_event = isinstance(entry, ReductionEvent)
    sizes = entry.state_sizes_before if is_event else entry.state_sizes
    lists = [sizes, *((entry.state_sizes_after, entry.keep, entry.energy_discarded) if is_event else ())]
    if not all(isinstance(each, list) and len(each) == len(sizes) for each in lists) or not sizes:
        raise TypeError("lists that are not one entry per layer")
    if not all(type(size) is int and size > 0 for size in sizes + (entry.state_sizes_after if is_event else [])):
        raise TypeError(f"state sizes {sizes}")
    if not (entry.step is None or type(entry.step) is int):
        raise TypeError(f"step {entry.step!r}")
    if is_event and [len(keep) for keep in entry.keep] != entry.state_sizes_after:
        raise TypeError("kept states that are not as many as the state sizes after the cut")
    if is_event and not all(-1e-9 <= share <= 1 for share in entry.energy_discarded):
        raise TypeError(f"energy_discarded {entry.energy_discarded}")
    for size, spectrum in zip(sizes, entry.hankel_singular_values, strict=True):
        if spectrum.shape != (size,) or not torch.isfinite(spectrum).all():
            raise TypeError(f"a spectrum of shape {tuple(spectrum.shape)}, NaN or Inf for {size} states")
