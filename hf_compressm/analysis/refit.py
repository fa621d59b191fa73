"""Refit: after a plan has chosen and compensated states, each cut layer learns to do what it did before, on data."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..architectures.family import SelectiveLayout, layout_of
from ..engines import full_tensor, raise_in_all_processes, sum_over_processes
from ..surgery.shrink_and_grow import maps_in
from ..theory.plan import Plan
from ..theory.selective import StateMaps
from .activations import layer_inputs
from .calibration import Batch
from .losses import mean_loss
from .masking import cut_layers, masked_parameters
from .output_fit import OutputError, fit_states


def refitted(
    model: nn.Module, plan: Plan, covariances: dict[int, Tensor], data: list[Batch], held_out: list[Batch]
) -> Plan:
    """The plan with its cut layers refitted, or the plan as it is where that did not lower the loss.

    From the first layer to the last, each on the inputs that it gets once those before it are cut and refitted, and
    kept only if the error of its output is smaller on batches that it was not fitted to. The same batches decide, by
    their loss, whether the whole is kept.

    Args:
        covariances: layer → Π of its states, (N, N).
        data: batches to fit to.
        held_out: batches to judge by.
    """
    result, layout, layers = dict(plan), layout_of(model), cut_layers(model, plan)
    for index, mixer in tqdm(layers.items(), desc="Refitting layers", leave=False, disable=len(layers) < 2):
        earlier = masked_parameters(model, {i: entry for i, entry in result.items() if i < index})
        whole = whole_maps(mixer, layout)
        output_projection = full_tensor(mixer.get_parameter(layout.output_projection).detach())
        with raise_in_all_processes():
            inputs = [layer_inputs(model, batches, index, earlier) for batches in (data, held_out)]
        error, judge = (OutputError(whole, output_projection, some, sum_over_processes) for some in inputs)
        keep, start = plan[index].kept_states, plan[index].maps_after_cut(whole)
        fitted = fit_states(error, judge, start, covariances[index][keep][:, keep])
        if fitted is not start:
            added = StateMaps(*(new - old for new, old in zip(fitted, start, strict=True)))
            result[index] = replace(plan[index], refit=added)
    if all(entry.refit is None for entry in result.values()):
        return plan
    before, after = (mean_loss(model, held_out, masked_parameters(model, some)) for some in (plan, result))
    return result if after < before else plan


def whole_maps(mixer: nn.Module, layout: SelectiveLayout) -> StateMaps:
    """The maps of all states of a layer, in float32 at least."""
    tensors = {path: full_tensor(mixer.get_parameter(path).detach()) for path in (layout.projection, layout.decay)}
    return StateMaps(
        *(values.to(torch.promote_types(values.dtype, torch.float32)) for values in maps_in(tensors, mixer, layout))
    )
