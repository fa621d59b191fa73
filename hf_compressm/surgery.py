"""Resize the state of a model in place, with its optimizer state and config: shrink, pad, grow. No policy.

An entry of a plan says what becomes of one layer: a `Selection` keeps some of its states as they are, a `Projection`
replaces its tensors by those of a smaller system.

Every operation checks first, then computes all new tensors, then swaps them in by plain assignments: it happens as a
whole or not at all. A resized tensor is a new Parameter: `param.data = …` would keep autograd metadata of the old
shape.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .engines import Engine, full, local, shard_like, together, unwrap, unwrap_optimizer
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


def plan_fingerprint(plan: Plan) -> str:
    """A text that is the same for equal plans only."""
    digest = hashlib.sha256()
    for index, entry in plan.items():
        tensors = entry.tensors if isinstance(entry, Projection) else {"compensation": entry.compensation}
        for name, tensor in {"keep": entry.keep, **tensors}.items():
            digest.update(f"{index} {name}".encode())
            digest.update(b"" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Whole:
    """A parameter as all processes hold it together: its value, its gradient, its optimizer state."""

    parameter: nn.Parameter
    value: Tensor
    grad: Tensor | None
    state: dict


@dataclass(frozen=True)
class _Replacement:
    module: nn.Module
    name: str
    old: _Whole
    value: Tensor
    grad: Tensor | None
    state: dict


# edit(layer, mixer, old, new): finish the new values of a layer's tensors, by path, in place.
_Edit = Callable[[int, nn.Module, dict[str, Tensor], dict[str, Tensor]], None]


def shrink_state(model: nn.Module, plan: Plan, optimizer=None, companions: Sequence[nn.Module] = ()) -> None:
    """Remove the states that the plan does not keep; a compensation goes into the kept rows of C.

    Args:
        model: a supported Transformers model.
        plan: for every layer of the model, what becomes of it; the same number of states in each, unless the
            architecture has a size per layer.
        optimizer: its moments are sliced at their positions; step counts and everything else stay. A projected layer
            has new coordinates, which old moments know nothing of: its tensors start afresh.
        companions: models of the same shape that follow, such as a running average of the weights. They keep the same
            states, compensated in their own weights; projected layers take the model's tensors.

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
        elif entry.compensation is not None:
            before = old[layout.projection][projection_rows(mixer, layout, STATE_OUTPUT)]
            rows = projection_rows(mixer, layout, STATE_OUTPUT, len(entry.keep))
            new[layout.projection][rows] = compensated_output_rows(before, entry)

    sources = {index: entry.keep for index, entry in plan.items()}
    _resize(model, sources, optimizer, finish, projected, companions)


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
    _resize(model, sources, optimizer, _as_gathered, companions=companions, is_prepared=is_prepared)


def compensated_output_rows(rows: Tensor, selection: Selection) -> Tensor:
    """The kept ones of the rows of C, (N, D) → (r, D): W_C[K] + Gᵀ W_C[R], in float64 (`maths`: compensation)."""
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
        if not torch.isfinite(local(parameter)).all():
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


def _as_gathered(index: int, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Leave new entries at zero."""


@torch.no_grad()
def _resize(
    model: nn.Module,
    sources: dict[int, Tensor],
    optimizer,
    edit: _Edit,
    afresh: frozenset | set = frozenset(),
    companions: Sequence[nn.Module] = (),
    is_prepared: bool = True,
) -> None:
    """Give every layer the states `sources` (for each new state the old one, or -1), all layers or none.

    Layers `afresh` start without gradients and without optimizer state. The model may be wrapped by its engine.
    """
    targets = [(Engine(model, trains=is_prepared), unwrap_optimizer(optimizer))]
    targets += [(Engine(companion, trains=False), None) for companion in companions]
    changing = _changing_layers(targets[0][0].model, sources, afresh)
    with together():
        for engine, target_optimizer in targets:
            check_state_tensors(engine.model, target_optimizer)
            if state_sizes(engine.model) != state_sizes(targets[0][0].model):
                raise ValueError(
                    f"a companion has state sizes {state_sizes(engine.model)}, the model has "
                    f"{state_sizes(targets[0][0].model)}: they have to be resized together from the start."
                )
    wholes = [_whole_tensors(engine.model, changing, target_optimizer) for engine, target_optimizer in targets]
    with together():
        replacements = [
            _replacements(engine.model, whole, sources, target_optimizer, edit, afresh)
            for (engine, target_optimizer), whole in zip(targets, wholes, strict=True)
        ]
    for (engine, target_optimizer), replaced in zip(targets, replacements, strict=True):
        mixers = state_layers(engine.model)  # looked up while sizes and tensors still agree
        _carry_out(engine, replaced, target_optimizer)
        for index, mixer in mixers.items():
            record_state_size(mixer, layout_of(engine.model), len(sources[index]))
        if replaced:
            engine.finish()


def _changing_layers(model: nn.Module, sources: dict[int, Tensor], afresh: frozenset | set) -> list[int]:
    sizes = state_sizes(model)
    return [i for i, size in sizes.items() if i in afresh or not torch.equal(sources[i].cpu(), torch.arange(size))]


def _whole_tensors(
    model: nn.Module, indices: list[int], optimizer: torch.optim.Optimizer | None
) -> dict[int, dict[str, _Whole]]:
    """Layer → path → parameter, gathered from all processes where it is sharded."""
    layout, mixers = layout_of(model), state_layers(model)

    def whole(parameter: nn.Parameter) -> _Whole:
        held = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        state = {key: full(value) for key, value in held.items()}
        grad = None if parameter.grad is None else full(parameter.grad)
        return _Whole(parameter, full(parameter.detach()), grad, state)

    return {i: {path: whole(mixers[i].get_parameter(path)) for path in layout.tensors} for i in indices}


def _replacements(
    model: nn.Module,
    whole: dict[int, dict[str, _Whole]],
    sources: dict[int, Tensor],
    optimizer: torch.optim.Optimizer | None,
    edit: _Edit,
    afresh: frozenset | set,
) -> list[_Replacement]:
    """All new values, gradients and optimizer states; nothing is changed yet."""
    layout, mixers = layout_of(model), state_layers(model)
    replacements = []
    for index, old in whole.items():
        mixer = mixers[index]
        axes = {path: tensor.axis for path, tensor in layout.tensors.items()}
        positions = {path: source_index(mixer, layout, t, sources[index]) for path, t in layout.tensors.items()}
        new = {path: gather(old[path].value, axes[path], positions[path]) for path in axes}
        edit(index, mixer, {path: old[path].value for path in axes}, new)
        for path, value in new.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"layer {index}: the resized {path} would hold NaN or Inf; nothing was changed.")
            grad, state = None, {}
            if index not in afresh:
                name, entries = f"layer {index} {path}", (axes[path], positions[path])
                state = resized_state(optimizer, name, old[path].state, old[path].value.shape, *entries)
                grad = None if old[path].grad is None else gather(old[path].grad, *entries)
            module_path, _, name = path.rpartition(".")
            replacements.append(_Replacement(mixer.get_submodule(module_path), name, old[path], value, grad, state))
    return replacements


def _carry_out(engine: Engine, replacements: list[_Replacement], optimizer: torch.optim.Optimizer | None) -> None:
    for replacement in replacements:
        old = replacement.old.parameter
        state = {key: shard_like(value, optimizer.state[old][key]) for key, value in replacement.state.items()}
        new = engine.replace(replacement.module, replacement.name, replacement.value)
        if replacement.grad is not None:
            new.grad = shard_like(replacement.grad, old.grad)
        if optimizer is not None:
            swap_parameter(optimizer, old, new, state)


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
