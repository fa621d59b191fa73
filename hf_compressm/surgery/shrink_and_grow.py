"""These functions shrink, pad and grow the state of a model in place, with its optimizer state and its config.

An entry of a plan says what becomes of one layer: a `Selection` keeps some of its states as they are, a `Projection`
replaces its tensors by those of a smaller system. `transaction.py` sees to it that all of this happens, or nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..architectures import StateLayers, family_of, state_layers, state_sizes
from ..engines import unwrap
from ..theory.plan import Plan
from .transaction import Edit, resize


def shrink_state(model: nn.Module, plan: Plan, optimizer=None, companions: Sequence[nn.Module] = ()) -> None:
    """Remove the states that a plan does not keep, and change the kept ones as the plan says.

    Args:
        model: a supported Transformers model.
        plan: what becomes of every layer of the model. A Mamba whose layers keep different numbers of states becomes a
            `CompreSSMMambaForCausalLM`, in place.
        optimizer: its moments are sliced at their positions; step counts and everything else stay. A projected layer
            has new coordinates, which old moments know nothing of: its tensors start afresh.
        companions: models of the same shape that follow, such as a running average of the weights. They keep the same
            states, with the same additions to their own weights; projected layers take the model's tensors.

    Raises:
        ValueError: the plan does not fit the model, weights are not finite or are trained in half precision, or the
            optimizer cannot follow. Nothing has been changed then.
    """
    layers = state_layers(unwrap(model))
    _check_plan(plan, layers)
    afresh = {index for index, entry in plan.items() if entry.starts_afresh}

    def finish(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        layers.family.reduce(plan[index], mixer, old, new)

    sources = {index: entry.kept_states for index, entry in plan.items()}
    resize(model, sources, optimizer, finish, afresh, companions)


def pad_state(model: nn.Module, size: int) -> None:
    """Enlarge every layer to `size` states by states that do nothing: their rows of B and C are zero.

    The function of the model stays exactly the same, and the new states never learn, since both gradients vanish. This
    is for tools that need a certain N; the states of `grow_state` learn.

    Raises:
        ValueError: a layer has more than `size` states, or cannot be padded to so many.
    """
    family = family_of(unwrap(model))

    def finish(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        family.pad(mixer, old, new)

    _enlarge(model, size, None, finish)


def grow_state(model: nn.Module, size: int, optimizer=None, generator: torch.Generator | None = None) -> None:
    """Enlarge every layer to `size` states by states that can learn; the model's function is unchanged.

    In a Mamba, the new rows of C are zero, the new rows of B are drawn as by the model's initialiser, and decay rates
    continue the sequence -1, -2, …; all new moments are zero.

    Raises:
        ValueError: a layer has more than `size` states, or the layers of this architecture cannot grow.
    """
    family = family_of(unwrap(model))

    def initialise(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        family.initialise(mixer, new, size, generator)

    _enlarge(model, size, optimizer, initialise)


def set_state_sizes(
    model: nn.Module,
    sizes: dict[int, int],
    optimizer=None,
    companions: Sequence[nn.Module] = (),
    is_prepared: bool = True,
) -> None:
    """Give every layer a size, for weights that are about to be loaded; what does not fit any more is lost.

    The optimizer holds the new parameters afterwards, and the engine synchronises them.

    Args:
        sizes: N by layer index.
        is_prepared: False before an engine has wrapped the model for several processes.
    """
    sources = {}
    for index, old_size in state_sizes(unwrap(model)).items():
        states = torch.arange(sizes[index])
        sources[index] = torch.where(states < old_size, states, -1)
    options = {"companions": companions, "is_prepared": is_prepared, "is_overwritten": True}
    resize(model, sources, optimizer, _leave_as_gathered, **options)


def _enlarge(model: nn.Module, size: int, optimizer, edit: Edit) -> None:
    sizes = state_sizes(unwrap(model))
    largest = max(sizes.values())
    if size < largest:
        raise ValueError(f"cannot enlarge to {size} states: a layer has {largest}. Give at least {largest}.")
    sources = {}
    for index, old_size in sizes.items():
        sources[index] = torch.full((size,), -1)
        sources[index][:old_size] = torch.arange(old_size)
    resize(model, sources, optimizer, edit)


def _leave_as_gathered(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Leave the gathered tensors as they are, and so new entries at zero."""


def _check_plan(plan: Plan, layers: StateLayers) -> None:
    if plan.keys() != layers.keys():
        raise ValueError(
            f"the plan for layers {sorted(plan)} was given to a model with layers {sorted(layers)}; make one for it."
        )
    for index, size in layers.sizes.items():
        kept = plan[index].kept_states
        if kept.numel() == 0 or (kept.diff() <= 0).any() or kept.min() < 0 or kept.max() >= size:
            raise ValueError(
                f"layer {index}: kept states must be sorted, distinct and within 0 … {size - 1}; got {kept}."
            )
