"""A refit fits the chosen and compensated states of each cut layer, on data, to what the layer did before."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..architectures import StateLayers
from ..engines import raise_in_all_processes, sum_over_processes
from ..theory.plan import Plan, PlanEntry
from ..theory.selective import StateMaps, heads_of
from .activations import layer_inputs
from .collate import Batch
from .losses import mean_loss
from .masking import cut_layers, masked_parameters
from .objective import Objective
from .output_fit import OutputError, fit_states

# layer index, what becomes of the layer, overrides that cut the layers before it → what becomes of it once refitted
LayerFit = Callable[[int, PlanEntry, dict[str, Tensor | int]], PlanEntry]


def refitted(
    layers: StateLayers,
    plan: Plan,
    covariances: dict[int, Tensor],
    objective: Objective,
    data: list[Batch],
    held_out: list[Batch],
) -> Plan:
    """Return the plan with its cut layers refitted, or the plan as it is where that did not lower the loss.

    Layers are refitted from the first to the last, each on the inputs that it gets once those before it are cut and
    refitted. A refit is kept only if the error of the layer's output is smaller on batches that it was not fitted to.
    The same batches decide, by their loss, whether all refits together are kept.

    Args:
        layers: the state layers of the model.
        plan: what becomes of each layer.
        covariances: layer → Π of its states, (N, N), or of those of each head, (heads, N, N).
        objective: the loss that the model is trained for.
        data: batches to fit to.
        held_out: batches that decide.
    """

    def fit(index: int, entry: PlanEntry, earlier: dict[str, Tensor | int]) -> PlanEntry:
        wholes, outputs = map(heads_of, (whole_maps(layers, index), layers.family.layer_output(layers[index])))
        with raise_in_all_processes():
            inputs = [layer_inputs(layers, batches, index, earlier) for batches in (data, held_out)]
        refits = []
        for head, (whole, output) in enumerate(zip(wholes, outputs, strict=True)):
            of_head = (some[len(some) // len(wholes) * head :][: len(some) // len(wholes)] for some in inputs)
            error, held_out_error = (OutputError(whole, output, some, sum_over_processes) for some in of_head)
            selection = entry.heads[head]
            kept, start = selection.kept_states, selection.maps_after_cut(whole)
            covariance = covariances[index].view(len(wholes), *covariances[index].shape[-2:])[head]
            fitted = fit_states(error, held_out_error, start, covariance[kept][:, kept])
            refits.append(None if fitted is start else fitted.map(torch.sub, start))
        return entry.with_refits(refits)

    return refitted_layer_by_layer(layers, plan, fit, objective, held_out)


def refitted_layer_by_layer(
    layers: StateLayers, plan: Plan, fit: LayerFit, objective: Objective, held_out: list[Batch]
) -> Plan:
    """Return the plan with its cut layers refitted, from the first to the last, or the plan where that did not help.

    Args:
        layers: the state layers of the model.
        plan: what becomes of each layer.
        fit: gives what becomes of a layer, in a model in which those before it are cut and refitted.
        objective: the loss that the model is trained for.
        held_out: batches on which that loss decides whether all refits together are kept.
    """
    result, cut = dict(plan), cut_layers(layers, plan)
    for index in tqdm(cut, desc="Refitting layers", leave=False, disable=len(cut) < 2):
        earlier = masked_parameters(layers, {i: entry for i, entry in result.items() if i < index})
        result[index] = fit(index, plan[index], earlier)
    if not any(entry.is_refitted for entry in result.values()):
        return plan
    before, after = (mean_loss(objective, held_out, masked_parameters(layers, some)) for some in (plan, result))
    return result if after < before else plan


def whole_maps(layers: StateLayers, index: int) -> StateMaps | tuple[StateMaps, ...]:
    """Return the maps of all states of a layer, or of each of its heads, in float32 at least."""
    maps = layers.family.maps(layers.whole_tensors(index), layers[index])
    return tuple(map(_in_float32, maps)) if isinstance(maps, tuple) else _in_float32(maps)


def _in_float32(maps: StateMaps) -> StateMaps:
    return maps.map(lambda values: values.to(torch.promote_types(values.dtype, torch.float32)))
