"""The entries of states are taken out of the tensors of a layer."""

import torch
from torch import Tensor, nn

from ..engines import full_tensor
from ..theory.plan import PlanEntry
from .family import Family


def gather(tensor: Tensor, axis: int, source: Tensor) -> Tensor:
    """Return the entries `source` of a tensor along an axis, zero where `source` is -1.

    Args:
        source: positions, 1-D; or 2-D, those for each entry of the first axis (a head).
    """
    if source.ndim == 2:
        return torch.stack([gather(part, axis - 1, some) for part, some in zip(tensor, source, strict=True)])
    source = source.to(tensor.device)
    gathered = tensor.index_select(axis, source.clamp_min(0))
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return torch.where((source >= 0).view(shape), gathered, torch.zeros_like(gathered))


def cut_tensors(family: Family, mixer: nn.Module, entry: PlanEntry) -> dict[str, Tensor | int]:
    """Return the whole state tensors of a layer after a cut, by path, and its N by the attribute that holds it.

    With these in the place of its own, an uncut layer is the layer after the cut. Every process has to call this
    function, since each may hold only a part of a tensor.
    """
    old = {path: full_tensor(mixer.get_parameter(path).detach()) for path in family.tensors}
    new = {}
    for path, tensor in old.items():
        new[path] = gather(tensor, family.tensors[path].axis, family.source_index(mixer, path, entry.kept_states))
    family.reduce(entry, mixer, old, new)
    return new | {family.size_attribute: entry.size}
