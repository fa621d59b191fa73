"""What an analysis takes is worked out before anything runs: from a model without weights, on the meta device, too."""

import time
from dataclasses import dataclass

from torch import nn

from ..architectures import StateLayers
from ..architectures.installed_scan import scan_installed
from ..config import CompreSSMConfig
from .calibration import take_batches, undisturbed
from .checks import batch_counts
from .losses import mean_loss
from .objective import Objective
from .states import statistics_bytes

FLOAT, DOUBLE = 4, 8  # bytes


@dataclass(frozen=True)
class AnalysisCost:
    """The cost of an analysis is what it holds in memory, in bytes, and how often it runs the model.

    What the forward pass of a batch takes for itself is not in it, since that depends on the kernels.

    Attributes:
        parameters: number of parameters.
        layers: number of layers with a state.
        weights: all parameters.
        statistics: running sums of all layers, to the end.
        logits: those of one batch, with what a loss in float32 makes of them.
        states: the states of one layer at one position of a batch, in float64.
        refit: what a refit holds of one layer: its inputs on all batches that it needs, and what it is to give.
        batches, batch_tokens: batches that are read, and tokens of each.
        passes: forward passes of a batch; a goal for which sizes are searched takes more.
        refit_passes: those by which the layers of a refit get their inputs.
    """

    parameters: int
    layers: int
    weights: int
    statistics: int
    logits: int
    states: int
    refit: int
    batches: int
    batch_tokens: int
    passes: int
    refit_passes: int

    @property
    def total(self) -> int:
        """Return the bytes that are held at one time, at most."""
        return self.weights + self.statistics + max(self.logits, self.states) + self.refit

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "statistics", "logits", "states", "refit")}
        passes = f"{self.passes} forward passes of a batch"
        if self.refit_passes:
            passes += f", {self.refit_passes} more for a refit, which is then fitted layer by layer"
        told = ", ".join(f"{name} {_in_gigabytes(size)}" for name, size in parts.items())
        return (
            f"{self.layers} layers with a state, {self.parameters:,} parameters; {self.batches} batches of "
            f"{self.batch_tokens:,} tokens.\n"
            f"Memory in GB: {told}; together {_in_gigabytes(self.total)}, and what a forward pass takes.\n"
            f"Work: {passes}."
        )

    def time(self, seconds: float) -> str:
        """Say how long the forward passes take, if one takes so many seconds."""
        total = seconds * (self.passes + self.refit_passes)
        return (
            f"A forward pass takes {seconds:.2g} s here, {seconds / self.layers:.2g} s for each layer with a state; "
            f"all take about {total:.2g} s."
        )


def analysis_cost(layers: StateLayers, config: CompreSSMConfig, sequences: int, length: int) -> AnalysisCost:
    """Work out what `analyze` of these layers takes, in one process.

    Args:
        layers: those of a model, which may lie on the meta device: no weight is read.
        config: the configuration of the analysis, with a target or a tolerance; other goals search for sizes.
        sequences, length: the size of a batch; `config.calibration_batches` says how many there are.
    """
    model, family, tokens = layers.model, layers.family, sequences * length
    content, parameters = model.config.to_dict(), list(model.parameters())  # a tied one is listed once
    for_statistics, for_refits, for_losses = batch_counts(config.calibration_batches, layers, config)
    itemsize, largest = parameters[0].element_size(), max(layers.sizes.values())
    inputs = for_statistics + for_refits if config.refit else 0  # batches
    held = family.refit_values(content, largest) * itemsize + model.config.hidden_size * FLOAT if config.refit else 0
    vocabulary = model.config.vocab_size if family.is_language_model else 0
    return AnalysisCost(
        parameters=sum(parameter.numel() for parameter in parameters),
        layers=len(layers),
        weights=sum(parameter.nbytes for parameter in parameters),
        statistics=statistics_bytes(layers),
        logits=tokens * vocabulary * (2 * FLOAT + (itemsize if itemsize < FLOAT else 0)),
        states=sequences * family.values_per_state(content) * largest * DOUBLE if family.needs_data else 0,
        refit=inputs * tokens * held,
        batches=config.calibration_batches,
        batch_tokens=tokens,
        passes=for_statistics + 2 * for_losses + 2,  # before and after; each layer alone, on a share of a batch
        # Those for a layer end there; in the end a loss decides.
        refit_passes=inputs * (len(layers) + 1) // 2 + 2 * for_refits,
    )


def seconds_per_pass(model: nn.Module, batch: dict) -> float:
    """Return how long a forward pass of this batch takes, as an analysis runs it."""
    (batch,) = take_batches([batch], 1)
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    with undisturbed(model), scan_installed():
        first = {name: value[:1] for name, value in batch.items()}
        mean_loss(Objective(model), [first], {})  # it may compile a kernel
        started = time.perf_counter()
        mean_loss(Objective(model), [batch], {})
        return time.perf_counter() - started


def _in_gigabytes(size: int) -> str:
    return f"{size / 1e9:.2g}" if size < 1e9 else f"{size / 1e9:.1f}"
