"""A selective model as a plan would leave it, at its full size and without touching it: dropped states masked."""

from torch import Tensor, nn

from ..architectures.family import SelectiveLayout, layout_of, state_layers, state_size
from ..engines import full_tensor
from ..surgery.shrink_and_grow import maps_in
from ..theory.plan import Plan, Selection
from ..theory.selective import complement
from .losses import parameter_names


def masked_parameters(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Parameter name → value, for the layers that the plan cuts; see `masked_tensors`."""
    layout, names, masked = layout_of(model), parameter_names(model), {}
    for index, mixer in cut_layers(model, plan).items():
        for path, value in masked_tensors(mixer, layout, plan[index]).items():
            masked[names[mixer.get_parameter(path)]] = value
    return masked


def cut_layers(model: nn.Module, plan: Plan) -> dict[int, nn.Module]:
    """The mixers that the plan takes states from, by layer."""
    layout = layout_of(model)
    mixers = {index: mixer for index, mixer in state_layers(model).items() if index in plan}
    return {i: mixer for i, mixer in mixers.items() if len(plan[i].kept_states) < state_size(mixer, layout)}


def masked_tensors(mixer: nn.Module, layout: SelectiveLayout, selection: Selection) -> dict[str, Tensor]:
    """Path → value at full size with which the mixer computes what it will after the cut.

    Rows of B and C that make dropped states are zero, the kept ones are as the cut leaves them. Decay rates change by
    a refit only.
    """
    paths = layout.projection, layout.decay
    tensors = {path: full_tensor(mixer.get_parameter(path).detach()).clone() for path in paths}
    whole = maps_in(tensors, mixer, layout)
    kept = selection.maps_after_cut(whole)
    keep = selection.kept_states.to(whole.B_rows.device)
    dropped = complement(keep, len(whole.B_rows))
    for rows, values in ((whole.B_rows, kept.B_rows), (whole.C_rows, kept.C_rows)):
        rows[dropped], rows[keep] = 0, values
    whole.A_log[:, keep] = kept.A_log
    return tensors if selection.refit is not None else {layout.projection: tensors[layout.projection]}
