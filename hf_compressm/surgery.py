"""Resize the state of a model in place, with its optimizer state and config: shrink, pad, grow. No policy.

An entry of a plan says what becomes of one layer: a `Selection` keeps some of its states as they are, a `Projection`
replaces its tensors by those of a smaller system.

Every operation checks first, then computes all new tensors, then swaps them in by plain assignments: it happens as a
whole or not at all. A resized tensor is a new Parameter: `param.data = …` would keep autograd metadata of the old
shape.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .engines import (
    data_parallel_wrapper,
    forget_compiled_code,
    rebuild,
    together,
    unwrap,
    unwrap_optimizer,
)
from .layouts import (
    STATE_INPUT,
    STATE_OUTPUT,
    SelectiveLayout,
    StateLayout,
    layout_of,
    projection_rows,
    record_state_size,
    source_index,
    state_layers,
    state_size,
    state_sizes,
)
from .optimizers import check_optimizer, gather, resized_state, swap_parameter
from .selective import complement


@dataclass(frozen=True)
class Selection:
    """What is kept of one layer: the states `keep`, sorted, (r,), and the `compensation` G, (N - r, r), if any."""

    keep: Tensor
    compensation: Tensor | None = None

    def cpu(self) -> "Selection":
        """The same on the CPU."""
        return Selection(self.keep.cpu(), None if self.compensation is None else self.compensation.cpu())


@dataclass(frozen=True)
class Projection:
    """What is made of one layer: `tensors` by path, of the balanced states `keep`, sorted, (r,)."""

    keep: Tensor
    tensors: dict[str, Tensor]

    def cpu(self) -> "Projection":
        """The same on the CPU."""
        return Projection(self.keep.cpu(), {path: tensor.cpu() for path, tensor in self.tensors.items()})


Plan = dict[int, Selection | Projection]


@dataclass(frozen=True)
class _Replacement:
    mixer: nn.Module
    path: str
    old: nn.Parameter
    new: nn.Parameter
    optimizer_state: dict


# edit(layer, mixer, tensors): finish the new values of a layer's tensors, by path, in place.
_Edit = Callable[[int, nn.Module, dict[str, Tensor]], None]


def shrink_state(model: nn.Module, plan: Plan, optimizer=None) -> None:
    """Remove the states that the plan does not keep; a compensation goes into the kept rows of C.

    Args:
        model: a supported Transformers model.
        plan: for every layer of the model, what becomes of it; the same number of states in each, unless the
            architecture has a size per layer.
        optimizer: its moments are sliced at their positions; step counts and everything else stay. A projected layer
            has new coordinates, which old moments know nothing of: its tensors start afresh.

    Raises:
        ValueError: a plan that does not fit the model, weights that are not finite, half-precision masters, or an
            optimizer that cannot follow. Nothing has been changed then.
    """
    layout, mixers = layout_of(unwrap(model)), state_layers(unwrap(model))
    _check_plan(plan, mixers, layout)
    projected = {index for index, entry in plan.items() if isinstance(entry, Projection)}

    def finish(index: int, mixer: nn.Module, tensors: dict[str, Tensor]) -> None:
        entry = plan[index]
        if isinstance(entry, Projection):
            tensors.update({path: entry.tensors[path].to(tensors[path]) for path in tensors})
        elif entry.compensation is not None:
            rows = projection_rows(mixer, layout, STATE_OUTPUT, len(entry.keep))
            tensors[layout.projection][rows] = compensated_output_rows(mixer, layout, entry)

    _resize(model, {index: entry.keep for index, entry in plan.items()}, optimizer, finish, projected)


def pad_state(model: nn.Module, size: int) -> None:
    """Enlarge every layer to `size` states by states that do nothing: B and C zero, any stable decay.

    Exact, and inert for ever, since both gradients vanish. For tools that want a certain N; `grow_state` learns.
    """
    _enlarge(model, size, None, lambda index, mixer, tensors: None)


def grow_state(model: nn.Module, size: int, optimizer=None, generator: torch.Generator | None = None) -> None:
    """Enlarge every layer to `size` states by states that can learn; the model's function is unchanged.

    Rows of C are zero, rows of B come from the model's initialiser, decay rates continue its ramp -1, -2, …, moments
    are zero.
    """
    bare = unwrap(model)
    layout = layout_of(bare)
    if not isinstance(layout, SelectiveLayout):
        raise ValueError(f"grow_state knows selective models only, not '{bare.config.model_type}'; use pad_state.")

    def initialise(index: int, mixer: nn.Module, tensors: dict[str, Tensor]) -> None:
        old_size = state_size(mixer, layout)
        rows = tensors[layout.projection][projection_rows(mixer, layout, STATE_INPUT, size)]
        std = bare.config.initializer_range
        rows[old_size:] = torch.empty(rows[old_size:].shape).normal_(0, std, generator=generator).to(rows)
        ramp = torch.arange(old_size + 1, size + 1).log()
        tensors[layout.decay][:, old_size:] = ramp.to(tensors[layout.decay])

    _enlarge(model, size, optimizer, initialise)


def compensated_output_rows(mixer: nn.Module, layout: SelectiveLayout, selection: Selection) -> Tensor:
    """The kept rows of C, (r, D): W_C[K] + Gᵀ W_C[R], computed in float64 (`maths`: compensation)."""
    rows = mixer.get_parameter(layout.projection).detach()[projection_rows(mixer, layout, STATE_OUTPUT)]
    keep = selection.keep.to(rows.device)
    kept = rows[keep]
    if selection.compensation is None:
        return kept
    dropped = rows[complement(keep, len(rows))].double()
    return (kept.double() + selection.compensation.to(dropped).mT @ dropped).to(kept.dtype)


def check_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Refuse a model or an optimizer whose state could not be resized well.

    Raises:
        ValueError: not finite; float16 or bfloat16 masters in training; an optimizer that cannot follow.
    """
    layout = layout_of(model)
    parameters = {}
    for index, mixer in state_layers(model).items():
        parameters |= {f"layer {index} {path}": mixer.get_parameter(path) for path in layout.tensors}
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or Inf: training has diverged; go back to an earlier checkpoint.")
        if optimizer is not None and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is trained in {parameter.dtype}, which ruins the decay spectrum. Keep the weights in float32 "
                "and train with autocast: TrainingArguments(bf16=True) and a model loaded with dtype=torch.float32."
            )
    if optimizer is not None:
        check_optimizer(optimizer, parameters)


def _enlarge(model: nn.Module, size: int, optimizer, edit: _Edit) -> None:
    sizes = state_sizes(unwrap(model))
    largest = max(sizes.values())
    if size < largest:
        raise ValueError(f"cannot enlarge to {size} states: a layer has {largest}. Give at least {largest}.")
    sources = {}
    for index, old_size in sizes.items():
        sources[index] = torch.full((size,), -1)
        sources[index][:old_size] = torch.arange(old_size)
    _resize(model, sources, optimizer, edit)


@torch.no_grad()
def _resize(
    model: nn.Module, sources: dict[int, Tensor], optimizer, edit: _Edit, afresh: frozenset | set = frozenset()
) -> None:
    """Give every layer the states `sources` (for each new state the old one, or -1), all layers or none.

    Layers `afresh` start without gradients and without optimizer state. The model may be wrapped by its engine.
    """
    wrapper, model, optimizer = data_parallel_wrapper(model), unwrap(model), unwrap_optimizer(optimizer)
    layout, mixers = layout_of(model), state_layers(model)
    with together():
        replacements = _replacements(model, sources, optimizer, edit, afresh)

    for replacement in replacements:
        assign_parameter(replacement.mixer, replacement.path, replacement.new)
        if optimizer is not None:
            swap_parameter(optimizer, replacement.old, replacement.new, replacement.optimizer_state)
    for index, mixer in mixers.items():
        record_state_size(mixer, layout, len(sources[index]))
    if wrapper is not None:
        rebuild(wrapper)
    if replacements:
        forget_compiled_code()


def _replacements(
    model: nn.Module, sources: dict[int, Tensor], optimizer, edit: _Edit, afresh: frozenset | set
) -> list[_Replacement]:
    """All new parameters with their optimizer state; nothing is changed yet."""
    layout, mixers = layout_of(model), state_layers(model)
    check_state_tensors(model, optimizer)
    replacements = []
    for index, mixer in mixers.items():
        if index not in afresh and torch.equal(sources[index].cpu(), torch.arange(state_size(mixer, layout))):
            continue  # nothing changes in this layer
        positions = {path: source_index(mixer, layout, t, sources[index]) for path, t in layout.tensors.items()}
        old = {path: mixer.get_parameter(path) for path in positions}
        values = {path: gather(old[path], layout.tensors[path].axis, positions[path]) for path in positions}
        edit(index, mixer, values)
        for path, value in values.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"layer {index}: the resized {path} would hold NaN or Inf; nothing was changed.")
            state, axis = {}, layout.tensors[path].axis
            if optimizer is not None and index not in afresh:
                state = resized_state(optimizer, f"layer {index} {path}", old[path], axis, positions[path])
            new = new_parameter_like(old[path], value)
            if old[path].grad is not None and index not in afresh:
                new.grad = gather(old[path].grad, axis, positions[path])
            replacements.append(_Replacement(mixer, path, old[path], new, state))
    return replacements


def new_parameter_like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A Parameter holding `value` with the attributes that were set on `old` (such as `_no_weight_decay`)."""
    new = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def assign_parameter(mixer: nn.Module, path: str, new: nn.Parameter) -> None:
    """Put `new` in the place of the mixer's parameter at `path`."""
    module_path, _, name = path.rpartition(".")
    mixer.get_submodule(module_path)._parameters[name] = new


def _check_plan(plan: Plan, mixers: dict[int, nn.Module], layout: StateLayout) -> None:
    if plan.keys() != mixers.keys():
        raise ValueError(f"a plan for layers {sorted(plan)} given to a model with layers {sorted(mixers)}.")
    sizes = {len(entry.keep) for entry in plan.values()}
    if len(sizes) > 1 and not layout.per_layer_sizes:
        raise ValueError(f"layers would keep {sorted(sizes)} states; give every layer the same number.")
    for index, mixer in mixers.items():
        keep, size = plan[index].keep, state_size(mixer, layout)
        if len(keep) == 0 or (keep.diff() <= 0).any() or keep[0] < 0 or keep[-1] >= size:
            raise ValueError(
                f"layer {index}: kept states must be sorted, distinct and within 0 … {size - 1}; got {keep}."
            )
