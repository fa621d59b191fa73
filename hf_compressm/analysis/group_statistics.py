"""Observe the layers with scalar decay on calibration data: the statistics of all, the inputs of one."""

from collections.abc import Callable

from torch import Tensor, nn

from ..architectures import StateLayers
from ..architectures.scalar_decay.family import GroupInputs, GroupLayerInputs
from ..engines import is_sharded
from ..kernels.scalar_decay_scan import sampled_states
from ..theory.scalar_decay import GroupStatistics
from .activations import StopForward, observe_layers
from .collate import Batch


def collect_group_statistics(layers: StateLayers, batches: list[Batch]) -> dict[int, GroupStatistics]:
    """Return layer → `GroupStatistics` over the batches, from forward passes of a model in eval mode."""
    family, statistics, weights = layers.family, {}, {}
    for index, mixer in layers.items():
        device = mixer.in_proj.weight.device
        statistics[index] = GroupStatistics.empty(family.groups(mixer), family.state_size(mixer), device)
        weights[index] = family.channel_weights(mixer)

    def observe(index: int, inputs: GroupLayerInputs, y: Tensor) -> None:
        of_layer, (_, scan, gate, mask) = statistics[index], inputs
        of_layer.accumulate_maps(scan.B, scan.C, mask)
        for position, states in sampled_states(scan.x, scan.time_step, scan.A, scan.B):
            weight = weights[index](y[:, position], gate[:, position]).view(states.shape[:3])
            counted = None if mask is None else mask[:, position]
            of_layer.accumulate_states(states, scan.C[:, position], weight, counted)

    observe_group_layers(layers, batches, {}, observe)
    return statistics


def group_layer_inputs(
    layers: StateLayers, batches: list[Batch], index: int, overrides: dict[str, Tensor | int]
) -> list[GroupLayerInputs]:
    """Return what the output of one layer is made of, by batch, in a model with some parameters overridden.

    A forward pass ends at that layer, except in a sharded model, which would be left with gathered parameters.
    """
    found, may_end = [], not is_sharded(layers.model)

    def observe(layer: int, inputs: GroupLayerInputs, y: Tensor) -> None:
        if layer == index:
            found.append(inputs)
            if may_end:
                raise StopForward

    observe_group_layers(layers, batches, overrides, observe)
    return found


def observe_group_layers(
    layers: StateLayers,
    batches: list[Batch],
    overrides: dict[str, Tensor | int],
    observe: Callable[[int, GroupLayerInputs, Tensor], None],
) -> None:
    """Run forward passes in which `observe` is told of every layer: its index, its inputs, and y of its scan."""
    projected: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int, projection: nn.Module, inputs: tuple, output: Tensor) -> None:
        projected[index] = inputs[0], layers.family.gate(layers[index], output)

    def observe_scan(index: int, mask: Tensor | None, scan: GroupInputs, y: Tensor) -> None:
        features, gate = projected.pop(index)
        observe(index, GroupLayerInputs(features, scan, gate, mask), y)

    handles = [
        mixer.in_proj.register_forward_hook(lambda *given, index=index: keep(index, *given))
        for index, mixer in layers.items()
    ]
    try:
        observe_layers(layers, batches, overrides, observe_scan)
    finally:
        for handle in handles:
            handle.remove()
