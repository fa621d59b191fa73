"""What a plan costs: the loss of the model as the plan would leave it, measured without touching the model."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .calibration import Batch, prediction_count
from .surgery import Plan


class LossMeter:
    """Measures losses on held-out batches, with some parameters overridden.

    Args:
        overrides: plan → parameter name → the value with which the model computes what it will after the cut.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], overrides: Callable[[Plan], dict[str, Tensor]]):
        self.model, self.batches, self.overrides, self.seconds = model, batches, overrides, 0.0
        self.predictions = [prediction_count(batch) for batch in batches]
        self._measured: dict[tuple[int, ...], list[float]] = {}

    def of(self, plan: Plan) -> float:
        """Mean loss over all batches, nats per prediction; plans of the same sizes are measured once."""
        losses = self._losses(plan)
        return sum(loss * count for loss, count in zip(losses, self.predictions, strict=True)) / sum(self.predictions)

    def change_by_one_layer(self, index: int, plan: Plan) -> float:
        """Change of the loss on the first batch when only this layer is cut."""
        return self._measure({index: plan[index]}, self.batches[:1])[0] - self._losses({})[0]

    def _losses(self, plan: Plan) -> list[float]:
        key = tuple(len(entry.keep) for entry in plan.values())
        if key not in self._measured:
            self._measured[key] = self._measure(plan, self.batches)
        return self._measured[key]

    def _measure(self, plan: Plan, batches: list[Batch]) -> list[float]:
        """Mean loss of each batch, nats per prediction."""
        overrides = self.overrides(plan)
        if plan and not overrides:
            return self._losses({})[: len(batches)]
        started = time.perf_counter()
        losses = [forward(self.model, batch, overrides).loss.item() for batch in batches]
        self.seconds += time.perf_counter() - started
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError(
                "the loss on the calibration batches is NaN or Inf: training has diverged. Nothing was changed."
            )
        return losses


def forward(model: nn.Module, batch: Batch, overrides: dict[str, Tensor]):
    """One forward pass with some parameters overridden; half-precision weights are taken in float32."""
    halves = {
        name: parameter.float()
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
    }
    overrides = halves | {name: value.float() if name in halves else value for name, value in overrides.items()}
    return functional_call(model, overrides, kwargs={**batch, "use_cache": False})


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter → its name in the whole model."""
    return {parameter: name for name, parameter in model.named_parameters()}
