"""Resize the state of a model in place, with its optimizer state and config: shrink, pad, grow. No policy.

An entry of a plan says what becomes of one layer: a `Selection` keeps some of its states as they are, a `Projection`
replaces its tensors by those of a smaller system. How all of it happens at once, or not at all, is in `resizing.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..architectures.family import (
    STATE_INPUT,
    STATE_OUTPUT,
    SelectiveLayout,
    StateLayout,
    layout_of,
    projection_rows,
    state_layers,
    state_size,
    state_sizes,
)
from ..engines import unwrap
from ..theory.plan import Plan, Projection
from ..theory.selective import StateMaps
from .transaction import Edit, resize


def shrink_state(model: nn.Module, plan: Plan, optimizer=None, companions: Sequence[nn.Module] = ()) -> None:
    """Remove the states that the plan does not keep; the others get what the plan makes them do in their place.

    Args:
        model: a supported Transformers model.
        plan: for every layer of the model, what becomes of it. Where layers of a Mamba keep different numbers of
            states it becomes a `CompreSSMMambaForCausalLM`, in place.
        optimizer: its moments are sliced at their positions; step counts and everything else stay. A projected layer
            has new coordinates, which old moments know nothing of: its tensors start afresh.
        companions: models of the same shape that follow, such as a running average of the weights. They keep the same
            states, with the same additions to their own weights; projected layers take the model's tensors.

    Raises:
        ValueError: a plan that does not fit the model, weights that are not finite, half-precision masters, or an
            optimizer that cannot follow. Nothing has been changed then.
    """
    layout, mixers = layout_of(unwrap(model)), state_layers(unwrap(model))
    _check_plan(plan, mixers, layout)
    projected = {index for index, entry in plan.items() if isinstance(entry, Projection)}

    def finish(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        entry = plan[index]
        if isinstance(entry, Projection):
            new.update({path: entry.tensors[path].to(new[path]) for path in new})
        else:
            put_maps(
                entry.maps_after_cut(maps_in(old, mixer, layout)), maps_in(new, mixer, layout, len(entry.kept_states))
            )

    sources = {index: entry.kept_states for index, entry in plan.items()}
    resize(model, sources, optimizer, finish, projected, companions)


def pad_state(model: nn.Module, size: int) -> None:
    """Enlarge every layer to `size` states by states that do nothing: B and C zero, any stable decay.

    Exact, and inert for ever, since both gradients vanish. For tools that want a certain N; `grow_state` learns.
    """
    _enlarge(model, size, None, _as_gathered)


def grow_state(model: nn.Module, size: int, optimizer=None, generator: torch.Generator | None = None) -> None:
    """Enlarge every layer to `size` states by states that can learn; the model's function is unchanged.

    Rows of C are zero, rows of B come from the model's initialiser, decay rates continue its ramp -1, -2, …, moments
    are zero.
    """
    bare = unwrap(model)
    layout = layout_of(bare)
    if not isinstance(layout, SelectiveLayout):
        raise ValueError(f"grow_state knows selective models only, not '{bare.config.model_type}'; use pad_state.")

    def initialise(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        old_size = state_size(mixer, layout)
        rows = new[layout.projection][projection_rows(mixer, layout, STATE_INPUT, size)]
        std = bare.config.initializer_range
        rows[old_size:] = torch.empty(rows[old_size:].shape).normal_(0, std, generator=generator).to(rows)
        ramp = torch.arange(old_size + 1, size + 1).log()
        new[layout.decay][:, old_size:] = ramp.to(new[layout.decay])

    _enlarge(model, size, optimizer, initialise)


def set_state_sizes(
    model: nn.Module,
    sizes: dict[int, int],
    optimizer=None,
    companions: Sequence[nn.Module] = (),
    is_prepared: bool = True,
) -> None:
    """Give every layer a size, for contents that are about to be loaded; what no longer fits is lost.

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
    resize(model, sources, optimizer, _as_gathered, **options)


def maps_in(
    tensors: dict[str, Tensor], mixer: nn.Module, layout: SelectiveLayout, size: int | None = None
) -> StateMaps:
    """Views of the maps in a layer's tensors, by path; of `size` states, if not of the mixer's own number."""
    projection = tensors[layout.projection]
    rows = (projection[projection_rows(mixer, layout, block, size)] for block in (STATE_INPUT, STATE_OUTPUT))
    return StateMaps(*rows, tensors[layout.decay])


def put_maps(maps: StateMaps, into: StateMaps) -> None:
    """Overwrite the tensors that `into` views."""
    for target, value in zip(into, maps, strict=True):
        target.copy_(value)


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


def _as_gathered(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Leave new entries at zero."""


def _check_plan(plan: Plan, mixers: dict[int, nn.Module], layout: StateLayout) -> None:
    if plan.keys() != mixers.keys():
        raise ValueError(f"a plan for layers {sorted(plan)} given to a model with layers {sorted(mixers)}.")
    for index, mixer in mixers.items():
        keep, size = plan[index].kept_states, state_size(mixer, layout)
        if len(keep) == 0 or (keep.diff() <= 0).any() or keep[0] < 0 or keep[-1] >= size:
            raise ValueError(
                f"layer {index}: kept states must be sorted, distinct and within 0 … {size - 1}; got {keep}."
            )
