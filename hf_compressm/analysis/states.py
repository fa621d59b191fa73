"""A `StateAnalysis` ranks the states of a model; `analyze_states` makes the one that its architecture asks for."""

from typing import Protocol

from torch import Tensor

from ..architectures import StateLayers
from ..architectures.scalar_decay.family import ScalarDecayFamily
from ..architectures.time_invariant.family import TimeInvariantFamily
from ..config import CompreSSMConfig
from ..theory.plan import Plan
from ..theory.selective import heads_of
from .collate import Batch
from .measured import MeasuredAnalysis
from .objective import Objective
from .scalar_decay import ScalarDecayAnalysis
from .selective import SelectiveAnalysis
from .time_invariant import TimeInvariantAnalysis


class StateAnalysis(Protocol):
    """A state analysis ranks the states of a model and makes plans that keep some of them.

    Attributes:
        criterion: how states are ranked: the name of a score, or "hankel" for balanced truncation.
        score_power: 1 where a score is the amplitude of an error, 2 where it is the square of one.
        compensate: whether kept states make up for dropped ones.
        tokens: calibration tokens behind the statistics; 0 where none were needed.
        scores: layer → score of each state, (N,): in stored order, or of the balanced states, descending; for groups
            of heads in stored order (G, N).
        covariances: layer → Π, how far states predict each other, (N, N); None where balanced states do not.
        gramians: layer → (P, Q), (N, N) or for groups of heads (G, N, N) each, of which the singular values are; None
            where there are only surrogates.
    """

    criterion: str
    score_power: int
    compensate: bool
    tokens: int
    scores: dict[int, Tensor]
    covariances: dict[int, Tensor] | None
    gramians: dict[int, tuple[Tensor, Tensor]] | None

    def hankel_singular_values(self) -> dict[int, Tensor]:
        """Return layer → σ, (N,), descending."""
        ...

    def plan(self, sizes: dict[int, int]) -> Plan:
        """Return what becomes of each layer at these sizes."""
        ...

    def predicted_errors(self, plan: Plan) -> dict[int, float]:
        """Return layer → squared error of a plan as a share of Σ σ_i²; an empty dict where σ do not tell it."""
        ...


def analyze_states(
    layers: StateLayers,
    batches: list[Batch],
    config: CompreSSMConfig,
    objective: Objective,
    held_out: list[Batch] | None = None,
) -> StateAnalysis:
    """Make the analysis that the architecture asks for, of a model in eval mode."""
    if isinstance(layers.family, TimeInvariantFamily):
        return TimeInvariantAnalysis(layers, config)
    return _measured(layers)(layers, batches, config, objective, held_out)


def sampled_positions(layers: StateLayers, batches: list[Batch]) -> dict[int, int]:
    """Return layer → at how many positions its states are sampled in forward passes of a model in eval mode."""
    return {
        index: int(heads_of(each)[0].samples) for index, each in _measured(layers).collect(layers, batches).items()
    }


def statistics_bytes(layers: StateLayers) -> int:
    """Return how much memory the statistics of all layers take; the model may lie on the meta device."""
    if not layers.family.needs_data:
        return 0
    of_nothing = _measured(layers).collect(layers, [])
    sums = (each for of_layer in of_nothing.values() for each in heads_of(of_layer))
    return sum(tensor.nbytes for each in sums for tensor in vars(each).values())


def _measured(layers: StateLayers) -> type[MeasuredAnalysis]:
    return ScalarDecayAnalysis if isinstance(layers.family, ScalarDecayFamily) else SelectiveAnalysis
