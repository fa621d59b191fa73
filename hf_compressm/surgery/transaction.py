"""A resize checks, gathers and computes all new parameters, and only then puts them in the place of the old.

Nothing is changed before every process knows that all is right, and an exception while things change is undone: a
resize happens as a whole or not at all. A resized tensor is a new Parameter, since `param.data = …` would keep
autograd metadata of the old shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..architectures import StateLayers, state_layers
from ..architectures.recorded_sizes import record_state_sizes
from ..architectures.tensors import gather
from ..engines import Engine, check_replaceable, full_tensor, raise_in_all_processes, shard_like
from .checks import check_state_tensors, state_parameters
from .optimizer_parts import OptimizerParts
from .optimizer_state import resized_state
from .undo import Undo


@dataclass(frozen=True)
class _Target:
    """A target is a model that is resized, as its engine holds it, with what trains it, if anything does."""

    engine: Engine
    layers: StateLayers
    optimizer: object
    parts: OptimizerParts

    @classmethod
    def from_engine(cls, engine: Engine, optimizer=None) -> "_Target":
        return cls(engine, state_layers(engine.model), optimizer, OptimizerParts(optimizer))


@dataclass(frozen=True)
class _WholeParameter:
    """This record keeps a parameter as whole tensors: its value, its gradient and what optimizers keep, by table."""

    parameter: nn.Parameter
    value: Tensor
    grad: Tensor | None
    states: dict[str, dict]


@dataclass(frozen=True)
class _Replacement:
    """A replacement keeps all that takes the place of one parameter, `name` of `module`.

    Attributes:
        label: what an error calls the new tensor.
        old: the parameter that is replaced.
        value, grad, states: what the new parameter gets, as whole tensors; `grad` may be None and `states` empty.
    """

    label: str
    module: nn.Module
    name: str
    old: _WholeParameter
    value: Tensor
    grad: Tensor | None
    states: dict[str, dict]


# An edit finishes the new values of a layer's tensors in place: edit(layer index, mixer, old, new), tensors by path.
Edit = Callable[[int, nn.Module, dict[str, Tensor], dict[str, Tensor]], None]


@torch.no_grad()
def resize(
    model: nn.Module,
    sources: dict[int, Tensor],
    optimizer,
    edit: Edit,
    afresh: frozenset | set = frozenset(),
    companions: Sequence[nn.Module] = (),
    is_prepared: bool = True,
    is_overwritten: bool = False,
) -> None:
    """Give every layer the states `sources`: all layers, or none.

    Args:
        model: the model as its engine holds it.
        sources: by layer index, for each state after the resize the one that it comes from, or -1, (N',).
        optimizer: what trains the model, or None.
        edit: what finishes the new values of a layer.
        afresh: the indices of the layers that start without gradients and without optimizer state.
        companions: models of the same sizes that follow, without an optimizer.
        is_prepared: False before an engine has wrapped the model for several processes.
        is_overwritten: True where other contents are about to be loaded, so that those of now may be NaN.

    Raises:
        ValueError: a model or an optimizer cannot be resized well; nothing has been changed then, in any process.
    """
    targets = [_Target.from_engine(Engine(model, trains=is_prepared), optimizer)]
    targets += [_Target.from_engine(Engine(companion, trains=False)) for companion in companions]
    sizes = {index: source.shape[-1] for index, source in sources.items()}
    with raise_in_all_processes():
        for target in targets:
            _check_target(target, targets[0], sizes, is_overwritten)
    changing = _changing_layers(targets[0].layers, sources, afresh)
    wholes = [_whole_tensors(target, changing) for target in targets]
    with raise_in_all_processes():
        replacements = [
            _replacements(target, whole, sources, edit, afresh) for target, whole in zip(targets, wholes, strict=True)
        ]
        if not is_overwritten:
            _check_finite(replacements)
    with Undo((target.engine for target in targets), (target.parts for target in targets)):
        with raise_in_all_processes():
            for target, replaced in zip(targets, replacements, strict=True):
                _carry_out(target, replaced)
                record_state_sizes(target.layers, sizes)
        for target, replaced in zip(targets, replacements, strict=True):
            if replaced:
                target.engine.finish()


def _check_target(target: _Target, first: _Target, sizes: dict[int, int], is_overwritten: bool) -> None:
    layers, expected = target.layers, first.layers.sizes
    check_state_tensors(layers, target.optimizer, is_overwritten)
    for name, parameter in state_parameters(layers).items():
        check_replaceable(name, parameter)
    if len(set(sizes.values())) > 1:
        layers.family.check_per_layer(layers.model)
    if layers.sizes != expected:
        raise ValueError(
            f"a companion has state sizes {layers.sizes}, the model has {expected}: they have to be resized together "
            "from the start."
        )


def _changing_layers(layers: StateLayers, sources: dict[int, Tensor], afresh: frozenset | set) -> list[int]:
    return [
        index
        for index, size in layers.sizes.items()
        if index in afresh or not torch.equal(sources[index].cpu(), torch.arange(size))
    ]


def _whole_tensors(target: _Target, indices: list[int]) -> dict[int, dict[str, _WholeParameter]]:
    """Gather the state parameters of these layers from all processes, by layer index and path."""

    def whole(parameter: nn.Parameter) -> _WholeParameter:
        states = {
            table: {key: full_tensor(value) for key, value in state.items()}
            for table, state in target.parts.states(parameter).items()
        }
        grad = None if parameter.grad is None else full_tensor(parameter.grad)
        return _WholeParameter(parameter, full_tensor(parameter.detach()), grad, states)

    return {i: {path: whole(old) for path, old in target.layers.parameters(i).items()} for i in indices}


def _replacements(
    target: _Target,
    whole: dict[int, dict[str, _WholeParameter]],
    sources: dict[int, Tensor],
    edit: Edit,
    afresh: frozenset | set,
) -> list[_Replacement]:
    """Compute all new values, gradients and optimizer states, and change nothing yet."""
    family, replacements = target.layers.family, []
    for index, old in whole.items():
        mixer = target.layers[index]
        entries = {  # path → (axis, positions)
            path: (family.tensors[path].axis, family.source_index(mixer, path, sources[index])) for path in old
        }
        new = {path: gather(old[path].value, *entries[path]) for path in entries}
        edit(index, mixer, {path: old[path].value for path in entries}, new)
        for path, value in new.items():
            grad, states = None, {}
            if index not in afresh:
                name, shape = f"layer {index} {path}", old[path].value.shape
                states = {
                    table: resized_state(table.removesuffix(".state"), name, state, shape, *entries[path])
                    for table, state in old[path].states.items()
                }
                grad = None if old[path].grad is None else gather(old[path].grad, *entries[path])
            module, attribute = target.layers.place(index, path)
            label = f"layer {index}: the resized {path}"
            replacements.append(_Replacement(label, module, attribute, old[path], value, grad, states))
    return replacements


def _check_finite(replacements: list[list[_Replacement]]) -> None:
    for replacement in (one for of_a_model in replacements for one in of_a_model):
        if not torch.isfinite(replacement.value).all():
            raise ValueError(f"{replacement.label} would hold NaN or Inf; nothing was changed.")


def _carry_out(target: _Target, replacements: list[_Replacement]) -> None:
    for replacement in replacements:
        old = replacement.old.parameter
        before = target.parts.states(old)
        states = {
            table: {key: shard_like(value, before[table][key]) for key, value in state.items()}
            for table, state in replacement.states.items()
        }
        new = target.engine.replace(replacement.module, replacement.name, replacement.value)
        if replacement.grad is not None:
            new.grad = shard_like(replacement.grad, old.grad)
        target.parts.swap_parameter(old, new, states)
