"""The analysis that an architecture asks for."""

from torch import nn

from ..architectures.family import TimeInvariantLayout, layout_of
from ..config import CompreSSMConfig
from .calibration import Batch
from .selective import SelectiveAnalysis
from .time_invariant import TimeInvariantAnalysis

StateAnalysis = SelectiveAnalysis | TimeInvariantAnalysis


def analyze_states(
    model: nn.Module, batches: list[Batch], config: CompreSSMConfig, held_out: list[Batch] | None = None
) -> StateAnalysis:
    """The analysis that the architecture asks for, of an unwrapped model in eval mode."""
    if isinstance(layout_of(model), TimeInvariantLayout):
        return TimeInvariantAnalysis(model, config)
    return SelectiveAnalysis(model, batches, config, held_out)
