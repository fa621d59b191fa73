"""Observe the scans of a selective model on calibration data: the statistics of all layers, the inputs of one."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import attrgetter

from torch import Tensor

from ..architectures import StateLayers
from ..engines import full_tensor, is_sharded
from ..kernels import effective_time_step, sampled_scan, selective_scan
from ..theory.selective import LayerInputs, Statistics
from .collate import Batch
from .objective import model_outputs, run

Observe = Callable[..., tuple[Tensor, Tensor]]  # (layer, attention mask, *arguments of a scan) → y, h_L


class StopForward(Exception):  # noqa: N818
    """It ends a forward pass whose later layers are not needed."""


def collect_statistics(layers: StateLayers, batches: list[Batch]) -> dict[int, Statistics]:
    """Return layer → `Statistics` over the batches, from forward passes of a model in eval mode."""
    family, statistics, weights = layers.family, {}, {}
    for index, mixer in layers.items():
        decay, output_projection = attrgetter(family.decay, family.output_projection)(mixer)  # it may be parametrized
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
    layers: StateLayers, batches: list[Batch], index: int, overrides: dict[str, Tensor | int]
) -> list[LayerInputs]:
    """Return what the scan of one layer is given, by batch, in a model with some parameters overridden.

    A forward pass ends at that layer, except in a sharded model, which would be left with gathered parameters.
    """
    inputs, may_end = [], not is_sharded(layers.model)

    def observe(layer: int, mask: Tensor | None, u, time_step, A, B, C, D, gate, time_step_bias, softplus):
        if layer == index:
            inputs.append(LayerInputs(u, effective_time_step(time_step, time_step_bias, softplus), gate, mask))
            if may_end:
                raise StopForward
        options = {"return_last_state": True}
        return selective_scan(u, time_step, A, B, C, D, gate, time_step_bias, softplus, **options)

    observe_layers(layers, batches, overrides, observe)
    return inputs


def observe_layers(
    layers: StateLayers, batches: list[Batch], overrides: dict[str, Tensor | int], observe: Observe
) -> None:
    """Run forward passes in which `observe` takes the place of every scan."""
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
                with suppress(StopForward):
                    run(layers.model, partial(model_outputs, layers.model, batch), overrides)
    finally:
        for handle in handles:
            handle.remove()
