"""Events and observations record what was measured at a point of training; read from JSON, they are checked."""

from collections.abc import Callable, Collection
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

REASONS = ("settled", "window ended")
TENSORS = ("hankel_singular_values", "scores")  # float64, (N,) or (G, N) per layer; some entries have no scores


class KeyedByLayer:
    """A record has lists beside `layers`; a position in a list is no layer index, since indices may have gaps."""

    layers: list[int]

    def by_layer(self, name: str) -> dict[int, Any]:
        """Return the list `name` by layer index; an empty dict where it was not measured (None)."""
        values = getattr(self, name)
        return {} if values is None else dict(zip(self.layers, values, strict=True))


@dataclass
class ReductionEvent(KeyedByLayer):
    """An event records one analysis and what came of it.

    A list has an entry for each layer of `layers`, in their order.

    Attributes:
        step: optimizer steps done; None outside a training run.
        layers: the indices of the layers that have a state, ascending; other layers may lie between them.
        state_sizes_before, state_sizes_after: N; equal where nothing was cut.
        kept_states: positions before the cut; in an axis-aligned layer with groups of heads a list for each group.
        score_discarded: share of the state score that was dropped, by the criterion.
        single_layer_loss_change: change of the loss by cutting this layer alone, on one calibration batch, nats per
            prediction. None, like the losses, where no batches were given.
        loss_before, loss_after: measured on the calibration batches held out, nats per prediction.
        tokens: calibration tokens behind the statistics.
        seconds: time of the analysis and the surgery; in Trainer, of the whole event.
        measuring_seconds: the part of it that went into measuring losses.
        criterion, compensate, refit: how states were ranked and made up for.
        hankel_singular_values: spectrum before the cut, (N,), descending.
        rolled_back_at: optimizer steps done when the cut was undone; None while it stands.
        goal: what this event was to achieve: the name of the goal and its value.
        reasons: why it was this layer's turn: "settled" or "window ended"; None in a layer whose turn it was not. None
            altogether where the step was fixed.
        recall_before, recall_after: how well pairs of tokens were recalled, {"loss", "accuracy"}; None where it was
            not asked for.
    """

    step: int | None
    layers: list[int]
    state_sizes_before: list[int]
    state_sizes_after: list[int]
    kept_states: list[list[int] | list[list[int]]]
    score_discarded: list[float]
    single_layer_loss_change: list[float] | None
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
    refit: bool = False
    reasons: list[str | None] | None = None
    recall_before: dict[str, float] | None = None
    recall_after: dict[str, float] | None = None

    @property
    def is_cut(self) -> bool:
        """Return whether any states were removed."""
        return self.state_sizes_before != self.state_sizes_after


@dataclass
class Observation(KeyedByLayer):
    """An observation records the singular values at one point of training, and how far they moved since the last.

    A list has an entry for each layer of `layers`, in their order.

    Attributes:
        step: optimizer steps done.
        layers: the indices of the layers that have a state, ascending; other layers may lie between them.
        state_sizes: N.
        movement: max_i |σ_i' - σ_i| since the observation before it; None at the first, and where a cut lies between.
        weyl_bound: what Weyl's theorem allows it to be, ‖H' - H‖; None where layers have no Gramians of their own, and
            at the first observation after a resume.
        seconds: time of the measurement.
        hankel_singular_values: spectrum, (N,), descending.
        scores: of each state by the criterion, (N,) or for groups of heads (G, N), in stored order. None, like what
            follows, where rankings are not compared.
        rank_noise, share_noise: how alike two calibration draws rank the states (Kendall's τ_b), and how far their
            score shares lie apart (total variation distance).
        compared_with: step of the earlier observation that the scores are compared with.
        rank_correlation, share_distance: the same measures between then and now, on one draw; None in a layer that was
            cut in between.
        settled_points: at how many observations in a row, up to this one, the layer moved no further than the noise.
    """

    step: int
    layers: list[int]
    state_sizes: list[int]
    movement: list[float] | None
    weyl_bound: list[float] | None
    seconds: float
    hankel_singular_values: list[Tensor] = field(repr=False)
    scores: list[Tensor] | None = field(default=None, repr=False)
    rank_noise: list[float] | None = None
    share_noise: list[float] | None = None
    compared_with: int | None = None
    rank_correlation: list[float | None] | None = None
    share_distance: list[float | None] | None = None
    settled_points: list[int] | None = None

    def share(self, name: str) -> dict[int, float]:
        """Return the distances `name` as shares of σ_1, by layer index; an empty dict where none were measured.

        Args:
            name: "movement" or "weyl_bound".
        """
        spectra = self.by_layer("hankel_singular_values")
        return {
            layer: distance / max(float(spectra[layer][0]), 1e-300) for layer, distance in self.by_layer(name).items()
        }


def to_record(entry: ReductionEvent | Observation) -> dict:
    """Return an entry in JSON types only."""
    tensors = {name: getattr(entry, name) for name in TENSORS if getattr(entry, name, None) is not None}
    return asdict(entry) | {name: [each.tolist() for each in value] for name, value in tensors.items()}


def from_record(kind: type, record: dict) -> ReductionEvent | Observation:
    """Return the entry that `to_record` made this record from.

    Raises:
        KeyError, TypeError: the record is not of this kind, or holds an impossible value.
    """
    given = {f.name: record[f.name] for f in fields(kind) if f.name in record or f.default is MISSING}
    entry = kind(**given)
    for name, value in given.items():
        if name in ALLOWED and not ALLOWED[name](value):
            raise TypeError(f"{name} = {value!r} is not allowed")
    for name in set(TENSORS) & {name for name, value in given.items() if value is not None}:
        if any(isinstance(tensor, Tensor) and tensor.dtype is not torch.float64 for tensor in given[name]):
            raise TypeError(f"{name} are not float64")
        setattr(entry, name, [torch.as_tensor(tensor, dtype=torch.float64) for tensor in given[name]])
    _check_record(entry)
    return entry


def sizes_text(sizes: Collection[int]) -> str:
    """Return a text of one number where all sizes are equal, otherwise of the smallest and the largest."""
    smallest, largest = min(sizes), max(sizes)
    return str(largest) if smallest == largest else f"{smallest}-{largest}"


def _is_count(value) -> bool:
    return type(value) is int and value >= 0


def _are_layers(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value)) and value == sorted(set(value))


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # no NaN, no Inf, and no int that no float can hold


def _are_numbers(value) -> bool:
    return isinstance(value, list) and all(type(each) in (int, float) for each in value)


def _are_numbers_or_none(value) -> bool:
    return isinstance(value, list) and all(each is None or type(each) in (int, float) for each in value)


def _are_named_numbers(value) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_recall(value) -> bool:
    return _are_named_numbers(value) and value.keys() == {"loss", "accuracy"} and 0 <= value["accuracy"] <= 1


def _none_or(is_allowed: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_allowed(value)


# What is allowed of single values, and of lists that may be missing; `_check_record` looks at the other lists.
ALLOWED = {
    "step": _none_or(_is_count),
    "layers": _are_layers,
    "score_discarded": _are_numbers,
    "single_layer_loss_change": _none_or(_are_numbers),
    "movement": _none_or(_are_numbers),
    "weyl_bound": _none_or(_are_numbers),
    "rank_noise": _none_or(_are_numbers),
    "share_noise": _none_or(_are_numbers),
    "compared_with": _none_or(_is_count),
    "rank_correlation": _none_or(_are_numbers_or_none),
    "share_distance": _none_or(_are_numbers_or_none),
    "settled_points": _none_or(lambda value: isinstance(value, list) and all(map(_is_count, value))),
    "reasons": _none_or(lambda value: isinstance(value, list) and all(each in (None, *REASONS) for each in value)),
    "loss_before": _none_or(_is_number),
    "loss_after": _none_or(_is_number),
    "tokens": _is_count,
    "seconds": _is_number,
    "measuring_seconds": _is_number,
    "criterion": lambda value: isinstance(value, str),
    "compensate": lambda value: isinstance(value, bool),
    "refit": lambda value: isinstance(value, bool),
    "rolled_back_at": _none_or(_is_count),
    "goal": _none_or(_are_named_numbers),
    "recall_before": _none_or(_is_recall),
    "recall_after": _none_or(_is_recall),
}

# Lists with an entry for each of `layers`; a record may lack some of them.
PER_LAYER = (
    "state_sizes",
    "state_sizes_before",
    "state_sizes_after",
    "kept_states",
    "score_discarded",
    "hankel_singular_values",
    "single_layer_loss_change",
    "reasons",
    "movement",
    "weyl_bound",
    "scores",
    "rank_noise",
    "share_noise",
    "rank_correlation",
    "share_distance",
    "settled_points",
)


def _check_record(entry: ReductionEvent | Observation) -> None:
    """Refuse lists that do not fit the layers, sizes that are no counts, and spectra that do not fit the sizes."""
    is_event = isinstance(entry, ReductionEvent)
    sizes = entry.state_sizes_before if is_event else entry.state_sizes
    lists = {name: getattr(entry, name) for name in PER_LAYER if getattr(entry, name, None) is not None}
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != len(entry.layers):
            raise TypeError(f"{name} does not have an entry for each of the layers {entry.layers}")
    if not all(type(size) is int and size > 0 for size in sizes + (entry.state_sizes_after if is_event else [])):
        raise TypeError(f"the state sizes {sizes}, or those after the cut, are not all positive whole numbers")
    if is_event:
        _check_cut(entry)
    for size, spectrum in zip(sizes, entry.hankel_singular_values, strict=True):
        if spectrum.shape != (size,) or not torch.isfinite(spectrum).all():
            raise TypeError(f"a spectrum of shape {tuple(spectrum.shape)} is not of {size} states or has NaN or Inf")
        if (spectrum < 0).any() or (spectrum.diff() > 1e-9 * spectrum[0]).any():
            raise TypeError("there is a spectrum that is not descending and at least 0")
    if not is_event and entry.scores is not None:
        _check_scores(entry)


def _check_scores(observation: Observation) -> None:
    for size, score in zip(observation.state_sizes, observation.scores, strict=True):
        if (
            score.shape[-1:] != (size,)
            or score.ndim > 2
            or not torch.isfinite(score).all()
            or (score < 0).any()
            or score.sum() <= 0
        ):
            raise TypeError(
                f"scores of shape {tuple(score.shape)} are not of {size} states, or are negative, NaN, Inf or all 0"
            )


def _check_cut(event: ReductionEvent) -> None:
    for before, after, kept in zip(event.state_sizes_before, event.state_sizes_after, event.kept_states, strict=True):
        for keep in kept if kept and all(isinstance(each, list) for each in kept) else [kept]:
            if len(keep) != after:
                raise TypeError("kept states are not as many as the state sizes after the cut say")
            if not all(_is_count(position) and position < before for position in keep) or len(set(keep)) < len(keep):
                raise TypeError(f"kept states {keep} of {before} are not distinct positions")
    if not all(-1e-9 <= share <= 1 for share in event.score_discarded):
        raise TypeError(f"score_discarded = {event.score_discarded} holds what is no share from 0 to 1")
    if (event.loss_before is None) != (event.loss_after is None):
        raise TypeError("there is a loss before or after the cut without the other")
    if (event.recall_before is None) != (event.recall_after is None):
        raise TypeError("there is recall before or after the cut without the other")
