"""These functions say what happens in a run while it trains, in words and as numbers for the Trainer's log."""

from collections.abc import Collection
from statistics import mean

from transformers import TrainerState

from ..report import StateReport
from ..storage.records import Observation, ReductionEvent, sizes_text


def cut_text(report: StateReport, state: TrainerState, reasons: dict[int, str] | None = None) -> str:
    """Return the plan that was carried out, and why it was due, where the step was not fixed.

    Args:
        reasons: why it is the turn of a layer, by layer index, as in `DueEvent`.
    """
    before, after = (sizes_text(sizes.values()) for sizes in (report.state_sizes_before, report.state_sizes))
    what = f"state size {before} → {after}" if report.is_cut else "nothing cut"
    reasons = reasons or {}
    for reason in sorted(set(reasons.values())):
        what += f"; {reason}: {_layers_text([layer for layer, given in reasons.items() if given == reason])}"
    return f"\nCompreSSM, step {state.global_step} of {state.max_steps}: {what}\n{report}"


def undone_text(undone: ReductionEvent, metric: str, value: float, state: TrainerState) -> str:
    """Return which cut was taken back, and why."""
    return (
        f"\nCompreSSM, step {state.global_step} of {state.max_steps}: {metric} = {value:.4f} is too bad beside what "
        f"it was before the cut at step {undone.step}; back to state size {sizes_text(undone.state_sizes_before)}"
    )


def observed_text(observation: Observation, state: TrainerState) -> str:
    """Return how far the singular values moved, and in which layers the ranking of the states stands still."""
    text = f"singular values, step {observation.step} of {state.max_steps}: N {sizes_text(observation.state_sizes)}"
    if observation.movement is not None:
        text += f", moved by at most {max(observation.share('movement').values()):.2%} of σ_1"
    if observation.weyl_bound is not None:
        text += f" (Weyl's bound {max(observation.share('weyl_bound').values()):.2%})"
    if observation.settled_points is not None:
        still = [layer for layer, points in observation.by_layer("settled_points").items() if points]
        text += f"; rankings as at step {observation.compared_with}: {_layers_text(still)}"
    return text


def event_numbers(event: ReductionEvent) -> dict[str, float]:
    """Return what an event measured, by name.

    The numbers are the state size (the mean over the layers that have a state), the score kept in the layer that kept
    least, losses in nats per prediction, and recall.
    """
    measured = {"loss_before_cut": event.loss_before, "loss_after_cut": event.loss_after}
    for when, recall in (("before", event.recall_before), ("after", event.recall_after)):
        measured |= {f"recall_{name}_{when}_cut": value for name, value in (recall or {}).items()}
    return {
        "state_size": mean(event.state_sizes_after),
        "score_kept": 1 - max(event.score_discarded),
        "seconds": event.seconds,
    } | {name: value for name, value in measured.items() if value is not None}


def undone_numbers(undone: ReductionEvent) -> dict[str, float]:
    """Return the state size (the mean over the layers that have a state) that the model is back to."""
    return {"state_size": mean(undone.state_sizes_before)}


def observed_numbers(observation: Observation) -> dict[str, float]:
    """Return what an observation measured, by name.

    The numbers are the largest movement of a singular value since the last observation, as a share of σ_1, and how
    rankings stand: the means over the layers, and how many layers moved no further than the noise.
    """
    numbers = {"state_size": mean(observation.state_sizes)}
    if observation.movement is not None:
        numbers["movement"] = max(observation.share("movement").values())
    if observation.rank_correlation is not None:
        correlations = [each for each in observation.rank_correlation if each is not None]
        numbers |= {"rank_correlation": mean(correlations)} if correlations else {}
        numbers["rank_noise"] = mean(observation.rank_noise)
        numbers["layers_settled"] = sum(points > 0 for points in observation.settled_points)
    return numbers


def _layers_text(layers: Collection[int]) -> str:
    """Return layer indices as words."""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else "no layer"
