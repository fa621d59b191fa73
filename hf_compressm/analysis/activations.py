"""What passes through the layers of a selective model on calibration data: statistics of all, the inputs of one."""

from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from ..architectures import StateLayers
from ..engines import full_tensor, is_sharded
from ..kernels import effective_time_step, sampled_scan, selective_scan
from ..theory.selective import LayerInputs, Statistics
from .calibration import Batch
from .losses import forward

Observe = Callable[..., tuple[Tensor, Tensor]]  # of (layer, attention mask, *arguments of a scan), what the scan gives


class _EnoughSeen(Exception):  # noqa: N818
    """The layers that follow are not needed."""


def collect_statistics(layers: StateLayers, batches: list[Batch]) -> dict[int, Statistics]:
    """Layer → `Statistics` over the batches, from forward passes of a model in eval mode."""
    family, statistics, weights = layers.family, {}, {}
    for index, mixer in layers.items():
        decay, output_projection = (mixer.get_parameter(path) for path in (family.decay, family.output_projection))
        statistics[index] = Statistics.empty(*decay.shape, device=decay.device)
        weights[index] = full_tensor(output_projection.detach()).double().square().sum(0)

    def observe(index: int, mask: Tensor | None, *arguments):
        y, last_state, positions, sample = sampled_scan(*arguments)
        counted = None if mask is None else mask[:, positions]
        statistics[index].accumulate(**sample, channel_weight=weights[index], mask=counted)
        return y, last_state

    observe_layers(layers, batches, {}, observe)
    return statistics


def layer_inputs(
    layers: StateLayers, batches: list[Batch], index: int, overrides: dict[str, Tensor]
) -> list[LayerInputs]:
    """What the scan of one layer is given, by batch, in a model with some parameters overridden.

    A forward pass ends behind that layer, but for a sharded model, which would be left with gathered parameters.
    """
    inputs, may_end = [], not is_sharded(layers.model)

    def observe(layer: int, mask: Tensor | None, u, time_step, A, B, C, D, gate, time_step_bias, softplus):
        if layer == index:
            inputs.append(LayerInputs(u, effective_time_step(time_step, time_step_bias, softplus), gate, mask))
            if may_end:
                raise _EnoughSeen
        options = {"return_last_state": True}
        return selective_scan(u, time_step, A, B, C, D, gate, time_step_bias, softplus, **options)

    observe_layers(layers, batches, overrides, observe)
    return inputs


def observe_layers(layers: StateLayers, batches: list[Batch], overrides: dict[str, Tensor], observe: Observe) -> None:
    """Forward passes in which `observe` runs in the place of every scan."""
    running: list[int] = []  # the layer whose scan comes next
    handles = [
        mixer.register_forward_pre_hook(lambda module, args, index=index: running.append(index))
        for index, mixer in layers.items()
    ]
    mask = None
    try:
        with layers.family.observed_scan(lambda *arguments: observe(running.pop(), mask, *arguments)):
            for batch in batches:
                mask = batch.get("attention_mask")
                with suppress(_EnoughSeen):
                    forward(layers.model, batch, overrides)
    finally:
        for handle in handles:
            handle.remove()
