"""What is measured on calibration batches: statistics of every layer, and the loss that a plan would leave."""

import math
import time

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .calibration import Batch, predicted_tokens
from .kernels import observed_scan
from .layouts import STATE_INPUT, STATE_OUTPUT, StateLayout, layout_of, projection_rows, state_layers, state_size
from .selective import Statistics, complement
from .surgery import Selection, compensated_output_rows

Plan = dict[int, Selection]


def collect_statistics(model: nn.Module, batches: list[Batch]) -> dict[int, Statistics]:
    """Layer → `Statistics` over the batches, from forward passes of an unwrapped model in eval mode."""
    layout, mixers = layout_of(model), state_layers(model)
    statistics = {
        index: Statistics.empty(*mixer.get_parameter(layout.decay).shape, device=next(mixer.parameters()).device)
        for index, mixer in mixers.items()
    }
    weights = {
        i: m.get_parameter(layout.output_projection).detach().double().square().sum(0) for i, m in mixers.items()
    }
    running: list[int] = []  # the layer whose scan comes next
    handles = [
        mixer.register_forward_pre_hook(lambda module, args, index=index: running.append(index))
        for index, mixer in mixers.items()
    ]
    mask = None

    def observer(u, time_step, A, B, C, gate):
        index = running.pop()
        statistics[index].accumulate(u, time_step, A, B, C, gate, weights[index], mask)

    try:
        with observed_scan(observer):
            for batch in batches:
                mask = batch.get("attention_mask")
                forward(model, batch, {})
    finally:
        for handle in handles:
            handle.remove()
    return statistics


class LossMeter:
    """Measures the loss of a model as a plan would leave it, by masks: dropped rows of B and C zero, C compensated."""

    def __init__(self, model: nn.Module, batches: list[Batch]):
        self.model, self.batches, self.seconds = model, batches, 0.0
        self.tokens = [predicted_tokens(batch) for batch in batches]
        self._measured: dict[tuple[int, ...], list[float]] = {}

    def of(self, plan: Plan) -> float:
        """Mean loss over all batches, nats per predicted token; plans of the same sizes are measured once."""
        losses = self._losses(plan)
        return sum(loss * count for loss, count in zip(losses, self.tokens, strict=True)) / sum(self.tokens)

    def change_by_one_layer(self, index: int, selection: Selection) -> float:
        """Change of the loss on the first batch when only this layer is cut."""
        return self._measure({index: selection}, self.batches[:1])[0] - self._losses({})[0]

    def _losses(self, plan: Plan) -> list[float]:
        key = tuple(len(selection.keep) for selection in plan.values())
        if key not in self._measured:
            self._measured[key] = self._measure(plan, self.batches)
        return self._measured[key]

    def _measure(self, plan: Plan, batches: list[Batch]) -> list[float]:
        """Mean loss of each batch, nats per predicted token."""
        masks = self._masked_projections(plan)
        if plan and not masks:
            return self._losses({})[: len(batches)]
        started = time.perf_counter()
        losses = [forward(self.model, batch, masks).loss.item() for batch in batches]
        self.seconds += time.perf_counter() - started
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError(
                "the loss on the calibration batches is NaN or Inf: training has diverged. Nothing was changed."
            )
        return losses

    def _masked_projections(self, plan: Plan) -> dict[str, Tensor]:
        layout, names = layout_of(self.model), {parameter: name for name, parameter in self.model.named_parameters()}
        masked = {}
        for index, mixer in state_layers(self.model).items():
            if index in plan and len(plan[index].keep) < state_size(mixer, layout):
                parameter = mixer.get_parameter(layout.projection)
                masked[names[parameter]] = masked_projection(mixer, layout, plan[index])
        return masked


def masked_projection(mixer: nn.Module, layout: StateLayout, selection: Selection) -> Tensor:
    """The projection at its full size with which the mixer computes what it will after the cut."""
    projection = mixer.get_parameter(layout.projection).detach().clone()
    dropped = complement(selection.keep, state_size(mixer, layout)).to(projection.device)
    for block in (STATE_INPUT, STATE_OUTPUT):
        projection[projection_rows(mixer, layout, block)][dropped] = 0
    kept_rows = projection_rows(mixer, layout, STATE_OUTPUT)
    projection[kept_rows][selection.keep] = compensated_output_rows(mixer, layout, selection)
    return projection


def forward(model: nn.Module, batch: Batch, overrides: dict[str, Tensor]):
    """One forward pass with some parameters overridden; half-precision weights are taken in float32."""
    halves = {
        name: parameter.float()
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
    }
    overrides = halves | {name: value.float() if name in halves else value for name, value in overrides.items()}
    return functional_call(model, overrides, kwargs={**batch, "use_cache": False})
