"""Refit: after a plan has chosen and compensated states, each cut layer learns to do what it did before, on data."""

from dataclasses import replace

from torch import nn
from tqdm.auto import tqdm

from .activations import layer_inputs
from .calibration import Batch
from .engines import full, sum_over_processes
from .layouts import layout_of
from .masking import cut_layers, masked_parameters
from .measurement import mean_loss
from .selective import StateMaps
from .state_fit import OutputError
from .surgery import Plan, Selection, maps_in


def refitted(model: nn.Module, plan: Plan, data: list[Batch], held_out: list[Batch]) -> Plan:
    """The plan with its cut layers refitted, or the plan as it is where that did not lower the loss.

    From the first layer to the last, each on the inputs that it gets once those before it are cut and refitted, and
    kept only if the error of its output is smaller on batches that it was not fitted to. The same batches decide, by
    their loss, whether the whole is kept.

    Args:
        data: batches to fit to.
        held_out: batches to judge by.
    """
    result = dict(plan)
    layers = cut_layers(model, plan)
    for index, mixer in tqdm(layers.items(), desc="Refitting layers", leave=False, disable=len(layers) < 2):
        overrides = masked_parameters(model, {i: entry for i, entry in result.items() if i < index})
        batches = (layer_inputs(model, some, index, overrides) for some in (data, held_out))
        result[index] = _refitted_layer(mixer, layout_of(model), plan[index], *batches)
    before, after = (mean_loss(model, held_out, masked_parameters(model, some)) for some in (plan, result))
    return result if after < before else plan


def _refitted_layer(mixer, layout, selection: Selection, data, held_out) -> Selection:
    paths = layout.projection, layout.decay
    whole = maps_in({path: full(mixer.get_parameter(path).detach()) for path in paths}, mixer, layout)
    whole = StateMaps(*(values.float() for values in whole))
    output_projection = full(mixer.get_parameter(layout.output_projection).detach())
    start = selection.of(whole)
    fitted = OutputError(whole, output_projection, data, sum_over_processes).minimised(start)
    judge = OutputError(whole, output_projection, held_out, sum_over_processes)
    if not judge.of(fitted) < judge.of(start):
        return selection
    return replace(selection, refit=StateMaps(*(new - old for new, old in zip(fitted, start, strict=True))))
