"""What passes through the layers of a selective model on calibration data: statistics of all, the inputs of one."""

from collections.abc import Callable

from torch import Tensor, nn

from ..architectures.family import layout_of, state_layers
from ..architectures.mamba_scan import observed_scan
from ..engines import full_tensor
from ..kernels import effective_time_step, sampled_scan, selective_scan
from ..theory.selective import Statistics
from .calibration import Batch
from .losses import forward
from .output_fit import LayerInputs


def collect_statistics(model: nn.Module, batches: list[Batch]) -> dict[int, Statistics]:
    """Layer → `Statistics` over the batches, from forward passes of an unwrapped model in eval mode."""
    layout, mixers = layout_of(model), state_layers(model)
    statistics = {
        index: Statistics.empty(*mixer.get_parameter(layout.decay).shape, device=next(mixer.parameters()).device)
        for index, mixer in mixers.items()
    }
    weights = {
        i: full_tensor(m.get_parameter(layout.output_projection).detach()).double().square().sum(0)
        for i, m in mixers.items()
    }

    def observe(index: int, mask: Tensor | None, *arguments):
        y, last_state, positions, sample = sampled_scan(*arguments)
        counted = None if mask is None else mask[:, positions]
        statistics[index].accumulate(**sample, channel_weight=weights[index], mask=counted)
        return y, last_state

    observe_layers(model, batches, {}, observe)
    return statistics


def layer_inputs(
    model: nn.Module, batches: list[Batch], index: int, overrides: dict[str, Tensor]
) -> list[LayerInputs]:
    """What the scan of one layer is given, by batch, in a model with some parameters overridden."""
    inputs = []

    def observe(layer: int, mask: Tensor | None, u, time_step, A, B, C, D, gate, time_step_bias, softplus):
        if layer == index:
            inputs.append(LayerInputs(u, effective_time_step(time_step, time_step_bias, softplus), gate, mask))
        options = {"return_last_state": True}
        return selective_scan(u, time_step, A, B, C, D, gate, time_step_bias, softplus, **options)

    observe_layers(model, batches, overrides, observe)
    return inputs


def observe_layers(
    model: nn.Module,
    batches: list[Batch],
    overrides: dict[str, Tensor],
    observe: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Forward passes in which `observe(layer, attention mask, *arguments)` runs in the place of every scan."""
    running: list[int] = []  # the layer whose scan comes next
    handles = [
        mixer.register_forward_pre_hook(lambda module, args, index=index: running.append(index))
        for index, mixer in state_layers(model).items()
    ]
    mask = None
    try:
        with observed_scan(lambda *arguments: observe(running.pop(), mask, *arguments)):
            for batch in batches:
                mask = batch.get("attention_mask")
                forward(model, batch, overrides)
    finally:
        for handle in handles:
            handle.remove()
