"""The statistics of all layers with scalar decay are taken from forward passes over calibration data."""

from torch import Tensor, nn

from ..architectures import StateLayers
from ..architectures.scalar_decay import GroupInputs
from ..kernels.scalar_decay_scan import sampled_states
from ..theory.scalar_decay import GroupStatistics
from .activations import observe_layers
from .collate import Batch


def collect_group_statistics(layers: StateLayers, batches: list[Batch]) -> dict[int, GroupStatistics]:
    """Return layer → `GroupStatistics` over the batches, from forward passes of a model in eval mode."""
    family, statistics, weights = layers.family, {}, {}
    for index, mixer in layers.items():
        device = mixer.in_proj.weight.device
        statistics[index] = GroupStatistics.empty(family.groups(mixer), family.state_size(mixer), device)
        weights[index] = family.channel_weights(mixer)
    gates: dict[int, Tensor] = {}

    def keep_gate(index: int, projection: nn.Module, inputs: tuple, projected: Tensor) -> None:
        gates[index] = family.gate(layers[index], projected)

    def observe(index: int, mask: Tensor | None, inputs: GroupInputs, y: Tensor) -> None:
        of_layer, gate = statistics[index], gates.pop(index)
        of_layer.accumulate_maps(inputs.B, inputs.C, mask)
        for position, states in sampled_states(inputs.x, inputs.time_step, inputs.A, inputs.B):
            weight = weights[index](y[:, position], gate[:, position]).view(states.shape[:3])
            counted = None if mask is None else mask[:, position]
            of_layer.accumulate_states(states, inputs.C[:, position], weight, counted)

    handles = [
        mixer.in_proj.register_forward_hook(lambda *given, index=index: keep_gate(index, *given))
        for index, mixer in layers.items()
    ]
    try:
        observe_layers(layers, batches, {}, observe)
    finally:
        for handle in handles:
            handle.remove()
    return statistics
