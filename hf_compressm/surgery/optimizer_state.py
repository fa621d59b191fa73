"""An optimizer must not decay some parameters of a layer, and its moments follow a resize."""

import warnings

import torch
from torch import Tensor, nn

from ..architectures.registry import FAMILIES
from ..architectures.tensors import gather

# Factored second moments (Adafactor of Transformers and of torch): which axis of the parameter each one lacks.
FACTORED = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2, "row_var": -1, "col_var": -2}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two parameter groups for any torch optimizer: one with weight decay, and one without.

    The second group holds `A_log`, `D`, biases and norms, as in the original Mamba code, and all parameters of the
    recurrence of an LRU. Trainer's default decays `A_log`, which pulls all decay rates together and biases the scores.

    Args:
        weight_decay: for the first group, per step and unit of learning rate.

    Returns:
        `[{"params": […], "weight_decay": weight_decay}, {"params": […], "weight_decay": 0.0}]`, trainable ones only.
    """
    exempt = {
        parameter
        for family in set(FAMILIES.values())
        for mixer in family.mixers_in(model).values()
        for parameter in family.undecayed(mixer)
    }
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decay_rate = name.endswith("A_log")  # in Mambas that are not served yet, too
            decays = parameter.ndim > 1 and not is_decay_rate and parameter not in exempt
            (decayed if decays else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def resized_state(where: str, name: str, state: dict, shape: torch.Size, axis: int, source: Tensor) -> dict:
    """Return what an optimizer's `state` of a parameter becomes once the entries along `axis` are taken from `source`.

    Tensors of the parameter's own shape and Adafactor's factors follow; scalars stay. State of another kind (8-bit
    blocks, projections) cannot be sliced: it is dropped with a warning, and starts afresh for that parameter.

    Args:
        where, name: where the state is kept, and the parameter, for the warning.
        state: the optimizer's state of the parameter, as whole tensors.
        shape: the parameter's shape before.
        axis: the state axis.
        source: for each entry after the resize, its position before, or -1 where it is new, as for `gather`.
    """
    resized = {}
    for key, value in state.items():
        if key in FACTORED and isinstance(value, Tensor):
            lacking = len(shape) + FACTORED[key]
            position = axis - (value.ndim < len(shape) and axis > lacking)  # torch's keep the axis, with one entry
            resized[key] = value.clone() if axis == lacking else gather(value, position, source)
        elif type(value) is Tensor and value.shape == shape:
            resized[key] = gather(value, axis, source)
        elif value is None or isinstance(value, int | float) or (type(value) is Tensor and value.ndim == 0):
            resized[key] = value
        else:
            warnings.warn(
                f"hf_compressm: the state '{key}' that {where} keeps for {name} cannot follow the resize; its state "
                "for this parameter starts afresh.",
                stacklevel=2,
            )
            return {}
    return resized
