"""Observe the scans of a selective model on calibration data: the statistics of all layers, the inputs of one."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import cycle
from operator import attrgetter

from torch import Tensor

from ..architectures import StateLayers
from ..engines import full_tensor, is_sharded
from ..kernels import effective_time_step, sampled_scan, selective_scan
from ..theory.selective import LayerInputs, Statistics, heads_of
from .collate import Batch
from .objective import model_outputs, run

Observe = Callable[..., tuple[Tensor, Tensor]]  # (layer, attention mask, *arguments of a scan) → y, h_L


class StopForward(Exception):  # noqa: N818
    """It ends a forward pass whose later layers are not needed."""


def collect_statistics(
    layers: StateLayers, batches: list[Batch]
) -> dict[int, Statistics] | dict[int, tuple[Statistics, ...]]:
    """Return layer → `Statistics` over the batches, or those of each head, from forward passes in eval mode."""
    family, statistics, weights = layers.family, {}, {}
    for index, mixer in layers.items():
        decay, output_projection = attrgetter(family.decay, family.output_projection)(mixer)  # it may be parametrized
        of_heads = [Statistics.empty(*decay.shape[-2:], device=decay.device) for _ in range(family.scans(mixer))]
        statistics[index] = tuple(of_heads) if decay.ndim == 3 else of_heads[0]
        weight = full_tensor(output_projection.detach()).double().square().sum(0)
        weights[index] = weight.view(len(of_heads), -1)
    heads = {index: cycle(range(len(of_layer))) for index, of_layer in weights.items()}

    def observe(index: int, mask: Tensor | None, *arguments):
        y, last_state, positions, sample = sampled_scan(*arguments)
        counted, head = None if mask is None else mask[:, positions], next(heads[index])
        heads_of(statistics[index])[head].accumulate(**sample, channel_weight=weights[index][head], mask=counted)
        return y, last_state

    observe_layers(layers, batches, {}, observe)
    return statistics


def layer_inputs(
    layers: StateLayers, batches: list[Batch], index: int, overrides: dict[str, Tensor | int]
) -> list[LayerInputs]:
    """Return what the scan of one layer is given, by batch, in a model with some parameters overridden.

    Of a layer with heads it is what the scans of the first head are given, then those of the second, and so on.

    A forward pass ends at that layer, except in a sharded model, which would be left with gathered parameters.
    """
    inputs, may_end, scans = [], not is_sharded(layers.model), layers.family.scans(layers[index])

    def observe(layer: int, mask: Tensor | None, u, time_step, A, B, C, D, gate, time_step_bias, softplus):
        if layer == index:
            inputs.append(LayerInputs(u, effective_time_step(time_step, time_step_bias, softplus), gate, mask))
            if may_end and len(inputs) % scans == 0:
                raise StopForward
        options = {"return_last_state": True}
        return selective_scan(u, time_step, A, B, C, D, gate, time_step_bias, softplus, **options)

    observe_layers(layers, batches, overrides, observe)
    return [each for head in range(scans) for each in inputs[head::scans]]


def observe_layers(
    layers: StateLayers, batches: list[Batch], overrides: dict[str, Tensor | int], observe: Observe
) -> None:
    """Run forward passes in which `observe` takes the place of every scan."""
    running: list[int] = []  # the layer whose scan comes next
    handles = [
        mixer.register_forward_pre_hook(
            lambda module, args, index=index: running.extend([index] * layers.family.scans(module))
        )
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
