"""What is said of a run while it trains: to read, and as numbers for the Trainer's log."""

from collections.abc import Collection
from statistics import mean

from transformers import TrainerState

from ..report import StateReport
from ..storage.records import Observation, ReductionEvent, sizes_text


def cut_text(report: StateReport, state: TrainerState, reasons: list[str | None] | None = None) -> str:
    """The plan that was carried out, and why now, where the step was not fixed."""
    before, after = (sizes_text(sizes.values()) for sizes in (report.state_sizes_before, report.state_sizes))
    what = f"state size {before} → {after}" if report.is_cut else "nothing cut"
    for reason in sorted(set(reasons or []) - {None}):
        what += f"; {reason}: {_layers_text([index for index, given in enumerate(reasons) if given == reason])}"
    return f"\nCompreSSM, step {state.global_step} of {state.max_steps}: {what}\n{report}"


def undone_text(undone: ReductionEvent, metric: str, value: float, state: TrainerState) -> str:
    """The cut that was taken back, and why."""
    return (
        f"\nCompreSSM, step {state.global_step} of {state.max_steps}: {metric} = {value:.4f} is too bad beside what "
        f"it was before the cut at step {undone.step}; back to state size {sizes_text(undone.state_sizes_before)}"
    )


def observed_text(observation: Observation, state: TrainerState) -> str:
    """How far the singular values moved, and where rankings are compared, in which layers they stand still."""
    text = f"singular values, step {observation.step} of {state.max_steps}: N {sizes_text(observation.state_sizes)}"
    if observation.movement is not None:
        text += f", moved by at most {max(observation.share(observation.movement)):.2%} of σ_1"
    if observation.weyl_bound is not None:
        text += f" (Weyl's bound {max(observation.share(observation.weyl_bound)):.2%})"
    if observation.settled_points is not None:
        still = [index for index, points in enumerate(observation.settled_points) if points]
        text += f"; rankings as at step {observation.compared_with}: {_layers_text(still)}"
    return text


def event_numbers(event: ReductionEvent) -> dict[str, float]:
    """State size (mean over the layers), score kept in the layer that kept least, losses in nats, and recall."""
    measured = {"loss_before_cut": event.loss_before, "loss_after_cut": event.loss_after}
    for when, recall in (("before", event.recall_before), ("after", event.recall_after)):
        measured |= {f"recall_{name}_{when}_cut": value for name, value in (recall or {}).items()}
    return {
        "state_size": mean(event.state_sizes_after),
        "score_kept": 1 - max(event.score_discarded),
        "seconds": event.seconds,
    } | {name: value for name, value in measured.items() if value is not None}


def undone_numbers(undone: ReductionEvent) -> dict[str, float]:
    """The state size (the mean over the layers) that the model is back to."""
    return {"state_size": mean(undone.state_sizes_before)}


def observed_numbers(observation: Observation) -> dict[str, float]:
    """The largest movement of a singular value since the last observation, as a share of σ_1; how rankings stand.

    Of these the means over the layers, and how many layers moved no further than the noise.
    """
    numbers = {"state_size": mean(observation.state_sizes)}
    if observation.movement is not None:
        numbers["movement"] = max(observation.share(observation.movement))
    if observation.rank_correlation is not None:
        correlations = [each for each in observation.rank_correlation if each is not None]
        numbers |= {"rank_correlation": mean(correlations)} if correlations else {}
        numbers["rank_noise"] = mean(observation.rank_noise)
        numbers["layers_settled"] = sum(points > 0 for points in observation.settled_points)
    return numbers


def _layers_text(layers: Collection[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else "no layer"
