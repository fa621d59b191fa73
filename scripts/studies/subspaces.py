"""This module watches how the subspaces that a balanced cut of a Mamba-2 would keep turn during training."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_compressm import CompreSSMConfig, analyze

from .training import OBSERVATIONS


@dataclass(frozen=True)
class Subspaces:
    """The subspaces of the features B and C that a cut after this step would keep, on two draws of data.

    Attributes:
        draws: layer by layer and for B and C orthonormal columns, (N, r), of each draw.
    """

    step: int
    draws: tuple[list[Tensor], list[Tensor]]


class SubspaceObserver(TrainerCallback):
    """It plans a balanced cut after every tenth of the run, twice, on disjoint batches, and carries out none.

    Args:
        size: the number r of states that would stay.
        batches: of which each plan is given half.
    """

    def __init__(self, size: int, batches: list[dict]):
        self.size, self.halves, self.seen = size, (batches[::2], batches[1::2]), []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % max(1, state.max_steps // OBSERVATIONS) == 0:
            first, second = (self.subspaces(model, batches) for batches in self.halves)
            self.seen.append(Subspaces(state.global_step, (first, second)))

    def subspaces(self, model, batches: list[dict]) -> list[Tensor]:
        config = CompreSSMConfig(target_state_size=self.size, basis="balanced", calibration_batches=len(batches))
        plan = analyze(model, batches, config).plan
        projections = [rows for entry in plan.values() for each in entry.tensors.values() for rows in each]
        return [torch.linalg.qr(rows.double().cpu().mT).Q for rows in projections]

    def overlaps(self) -> list[dict]:
        """Return by step the mean overlap with the end, with the step before, and that of two draws at the step."""
        turns, before = [], None
        for seen in self.seen:
            turns.append(
                {
                    "step": seen.step,
                    "with_end": overlap(seen.draws[0], self.seen[-1].draws[0]),
                    "with_before": None if before is None else overlap(seen.draws[0], before.draws[0]),
                    "of_draws": overlap(*seen.draws),
                }
            )
            before = seen
        return turns


def overlap(some: list[Tensor], others: list[Tensor]) -> float:
    """Return the mean squared cosine of the principal angles: 1 for the same subspaces, r / N for random ones."""
    shares = [(one.mT @ other).square().sum() / one.shape[1] for one, other in zip(some, others, strict=True)]
    return float(torch.stack(shares).mean())
