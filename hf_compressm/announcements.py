"""What is printed during training."""

from collections.abc import Collection

from transformers import TrainerState

from .history import Observation, ReductionEvent
from .reduction import StateReport


def cut_text(report: StateReport, state: TrainerState) -> str:
    """The plan that was carried out."""
    before, after = (sizes_text(sizes.values()) for sizes in (report.state_sizes_before, report.state_sizes))
    what = f"state size {before} → {after}" if report.is_cut else "nothing cut"
    return f"\nCompreSSM, step {state.global_step} of {state.max_steps}: {what}\n{report}"


def undone_text(undone: ReductionEvent, metric: str, value: float, state: TrainerState) -> str:
    """The cut that was taken back, and why."""
    return (
        f"\nCompreSSM, step {state.global_step} of {state.max_steps}: {metric} = {value:.4f} is too bad beside what "
        f"it was before the cut at step {undone.step}; back to state size {sizes_text(undone.state_sizes_before)}"
    )


def observed_text(observation: Observation, state: TrainerState) -> str:
    """How far the singular values moved."""
    text = f"singular values, step {observation.step} of {state.max_steps}: N {sizes_text(observation.state_sizes)}"
    if observation.movement is not None:
        text += f", moved by at most {max(observation.share(observation.movement)):.2%} of σ_1"
    if observation.weyl_bound is not None:
        text += f" (Weyl's bound {max(observation.share(observation.weyl_bound)):.2%})"
    return text


def sizes_text(sizes: Collection[int]) -> str:
    """One number where all are equal, otherwise the smallest and the largest."""
    smallest, largest = min(sizes), max(sizes)
    return str(largest) if smallest == largest else f"{smallest}-{largest}"
