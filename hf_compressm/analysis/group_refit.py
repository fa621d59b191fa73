"""A refit of a layer with scalar decay fits the channels of B and C, or the projections, to what the layer did uncut.

Steps of one length have to change the output alike. So rows of `in_proj` are fitted in the basis in which what the
layer is given is white, and a row and the taps behind it, of which only the product counts, are made equally large.
Projections are fitted in the bases in which states and read-outs are white.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..architectures import StateLayers
from ..engines import raise_in_all_processes, sum_over_processes
from ..theory.plan import GroupSelection, Plan, PlanEntry, Projection
from .collate import Batch
from .group_statistics import group_layer_inputs
from .objective import Objective
from .output_fit import OutputError, fit_maps
from .refit import refitted_layer_by_layer

Maps = dict[str, Tensor]  # by path
# Of the largest eigenvalue of a covariance; below it a direction counts as if it had that much.
FLOOR_OF_GRAMIANS, FLOOR_OF_FEATURES = 1e-6, 1e-4


def refitted_groups(
    layers: StateLayers,
    plan: Plan,
    gramians: dict[int, tuple[Tensor, Tensor]],
    objective: Objective,
    data: list[Batch],
    held_out: list[Batch],
) -> Plan:
    """Return the plan with its cut layers refitted, or the plan as it is where that did not lower the loss.

    As for Mamba-1, each layer is fitted on the inputs that it gets once those before it are cut and refitted, and kept
    where its error is smaller on batches that it was not fitted to.

    Args:
        layers: the state layers of the model.
        plan: what becomes of each layer.
        gramians: layer → (P, Q), (G, N, N) each.
        objective: the loss that the model is trained for.
        data: batches to fit to.
        held_out: batches that decide.
    """

    def fit(index: int, entry: PlanEntry, earlier: dict[str, Tensor | int]) -> PlanEntry:
        family, mixer, tensors = layers.family, layers[index], _in_float(layers.whole_tensors(index))
        output = family.layer_output(mixer)
        with raise_in_all_processes():
            inputs = [group_layer_inputs(layers, batches, index, earlier) for batches in (data, held_out)]
        if isinstance(entry, GroupSelection):
            whole, start = family.channel_maps(mixer, tensors), family.channel_maps(mixer, tensors, entry.kept_states)
            features = torch.cat([batch.features.flatten(0, 1) for batch in inputs[0]]).double()
            covariance = features.mT @ features
            sum_over_processes([covariance])
            leaves, maps = _channel_leaves(start, covariance)
        else:
            whole, start = _identities(tensors), {path: entry.tensors[path].to(tensors[path]) for path in tensors}
            start = _before_projection(start, tensors)
            leaves, maps = _projection_leaves(start, gramians[index])
        error, held_out_error = (OutputError(whole, output, some, sum_over_processes) for some in inputs)
        fitted = fit_maps(error, held_out_error, start, leaves, maps)
        if fitted is start:
            return entry
        if isinstance(entry, GroupSelection):
            return GroupSelection(entry.kept_states, {path: fitted[path] - start[path] for path in fitted})
        return Projection(entry.kept_states, {path: fitted[path] @ tensors[path] for path in fitted}, True)

    return refitted_layer_by_layer(layers, plan, fit, objective, held_out)


def _in_float(tensors: Maps) -> Maps:
    return {path: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for path, tensor in tensors.items()}


def _identities(tensors: Maps) -> Maps:
    """Return the projections that leave the present states of a layer as they are, (G, r, r) each."""
    return {
        path: torch.eye(tensor.shape[1]).to(tensor).expand(len(tensor), -1, -1) for path, tensor in tensors.items()
    }


def _before_projection(projections: Maps, present: Maps) -> Maps:
    """Return W with W · present = projection: what the new projections do to the states that the layer has now."""
    return {path: projections[path] @ torch.linalg.pinv(present[path]) for path in present}


def _roots(covariance: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return S^½ and S^-½ of covariances, (..., n, n) each."""
    values, vectors = torch.linalg.eigh(covariance.double())
    roots = values.clamp_min(floor * values.amax(-1, keepdim=True).clamp_min(1e-300)).sqrt().unsqueeze(-2)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _projection_leaves(start: Maps, gramians: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Callable[[], Maps]]:
    """Return what to fit of projections, and the function that makes projections of it."""
    whitened, back = [], []
    for value, gramian in zip(start.values(), gramians, strict=True):
        root, inverse = (each.to(value) for each in _roots(gramian, FLOOR_OF_GRAMIANS))
        scale = (value @ root).square().mean().sqrt().clamp_min(1e-12)
        whitened.append((value @ root / scale).requires_grad_())
        back.append(scale * inverse)

    def maps() -> Maps:
        return {path: leaf @ inverse for path, leaf, inverse in zip(start, whitened, back, strict=True)}

    return whitened, maps


def _channel_leaves(start: Maps, covariance: Tensor) -> tuple[list[Tensor], Callable[[], Maps]]:
    """Return what to fit of the channels of B and C, and the function that makes channels of it.

    Args:
        covariance: of what `in_proj` is given, (hidden, hidden), up to a factor.
    """
    roots = _roots(covariance / covariance.diagonal().mean(), FLOOR_OF_FEATURES)
    root, inverse = (each.to(start["in_proj.weight"]) for each in roots)
    rows, taps = start["in_proj.weight"] @ root, start["conv1d.weight"]
    of_rows, of_taps = (each.flatten(1).norm(dim=1).clamp_min(1e-12) for each in (rows, taps))
    share = (of_taps / of_rows).sqrt().unsqueeze(1)  # both get the root of the product of their sizes
    whitened = start | {"in_proj.weight": rows * share, "conv1d.weight": taps / share.unsqueeze(2)}
    leaves = {path: value.clone().requires_grad_() for path, value in whitened.items()}

    def maps() -> Maps:
        return leaves | {"in_proj.weight": leaves["in_proj.weight"] @ inverse}

    return list(leaves.values()), maps
