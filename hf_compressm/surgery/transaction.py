"""All new parameters of a resize at once: checked, gathered, computed, and only then put in the place of the old.

Nothing is changed before everything is known to be right, in every process: it happens as a whole or not at all. A
resized tensor is a new Parameter: `param.data = …` would keep autograd metadata of the old shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..architectures.family import layout_of, source_index, state_layers, state_sizes
from ..architectures.state_sizes import check_per_layer, record_state_sizes
from ..engines import Engine, full_tensor, raise_in_all_processes, shard_like, to_local, unwrap_optimizer
from .optimizer_state import check_optimizer, gather, resized_state, swap_parameter


@dataclass(frozen=True)
class _Whole:
    """A parameter as all processes hold it together: its value, its gradient, its optimizer state."""

    parameter: nn.Parameter
    value: Tensor
    grad: Tensor | None
    state: dict


@dataclass(frozen=True)
class _Replacement:
    label: str
    module: nn.Module
    name: str
    old: _Whole
    value: Tensor
    grad: Tensor | None
    state: dict


# edit(layer, mixer, old, new): finish the new values of a layer's tensors, by path, in place.
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
    """Give every layer the states `sources`, all layers or none.

    Args:
        model: as its engine has it.
        sources: by layer, for each new state the old one it comes from, or -1, (N',).
        optimizer: the one that trains the model, or None.
        edit: finishes the new values.
        afresh: layers that start without gradients and without optimizer state.
        companions: models of the same sizes that follow, without an optimizer.
        is_prepared: False before an engine has wrapped the model for several processes.
        is_overwritten: True where other contents are about to be loaded, so that those of now may be NaN.

    Raises:
        ValueError: nothing has been changed then, in any process.
    """
    targets = [(Engine(model, trains=is_prepared), unwrap_optimizer(optimizer))]
    targets += [(Engine(companion, trains=False), None) for companion in companions]
    changing = _changing_layers(targets[0][0].model, sources, afresh)
    sizes = {index: len(source) for index, source in sources.items()}
    with raise_in_all_processes():
        for engine, target_optimizer in targets:
            check_state_tensors(engine.model, target_optimizer, is_overwritten)
            if len(set(sizes.values())) > 1:
                check_per_layer(engine.model)
            if state_sizes(engine.model) != state_sizes(targets[0][0].model):
                raise ValueError(
                    f"a companion has state sizes {state_sizes(engine.model)}, the model has "
                    f"{state_sizes(targets[0][0].model)}: they have to be resized together from the start."
                )
    wholes = [_whole_tensors(engine.model, changing, target_optimizer) for engine, target_optimizer in targets]
    with raise_in_all_processes():
        replacements = [
            _replacements(engine.model, whole, sources, target_optimizer, edit, afresh)
            for (engine, target_optimizer), whole in zip(targets, wholes, strict=True)
        ]
        if not is_overwritten:
            _check_finite(replacements)
    for (engine, target_optimizer), replaced in zip(targets, replacements, strict=True):
        _carry_out(engine, replaced, target_optimizer)
        record_state_sizes(engine.model, sizes)
        if replaced:
            engine.finish()


def check_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, is_overwritten: bool = False
) -> None:
    """Refuse a model or an optimizer whose state could not be resized well.

    Args:
        is_overwritten: True where other contents are about to be loaded, so that those of now may be NaN.

    Raises:
        ValueError: not finite; float16 or bfloat16 masters in training; an optimizer that cannot follow.
    """
    layout = layout_of(model)
    parameters = {}
    for index, mixer in state_layers(model).items():
        parameters |= {f"layer {index} {path}": mixer.get_parameter(path) for path in layout.tensors}
    for name, parameter in parameters.items():
        if not is_overwritten and not torch.isfinite(to_local(parameter)).all():
            raise ValueError(f"{name} holds NaN or Inf: training has diverged; go back to an earlier checkpoint.")
        if optimizer is not None and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is trained in {parameter.dtype}, which ruins the decay spectrum. Keep the weights in float32 "
                "and train with autocast: TrainingArguments(bf16=True) and a model loaded with dtype=torch.float32."
            )
    if optimizer is not None:
        check_optimizer(optimizer, parameters)


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
        state = {key: full_tensor(value) for key, value in held.items()}
        grad = None if parameter.grad is None else full_tensor(parameter.grad)
        return _Whole(parameter, full_tensor(parameter.detach()), grad, state)

    return {i: {path: whole(mixers[i].get_parameter(path)) for path in layout.tensors} for i in indices}


def _replacements(
    model: nn.Module,
    whole: dict[int, dict[str, _Whole]],
    sources: dict[int, Tensor],
    optimizer: torch.optim.Optimizer | None,
    edit: Edit,
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
            grad, state = None, {}
            if index not in afresh:
                name, entries = f"layer {index} {path}", (axes[path], positions[path])
                state = resized_state(optimizer, name, old[path].state, old[path].value.shape, *entries)
                grad = None if old[path].grad is None else gather(old[path].grad, *entries)
            module_path, _, attribute = path.rpartition(".")
            module = mixer.get_submodule(module_path)
            label = f"layer {index}: the resized {path}"
            replacements.append(_Replacement(label, module, attribute, old[path], value, grad, state))
    return replacements


def _check_finite(replacements: list[list[_Replacement]]) -> None:
    for replacement in (one for of_a_model in replacements for one in of_a_model):
        if not torch.isfinite(replacement.value).all():
            raise ValueError(f"{replacement.label} would hold NaN or Inf; nothing was changed.")


def _carry_out(engine: Engine, replacements: list[_Replacement], optimizer: torch.optim.Optimizer | None) -> None:
    for replacement in replacements:
        old = replacement.old.parameter
        state = {key: shard_like(value, optimizer.state[old][key]) for key, value in replacement.state.items()}
        new = engine.replace(replacement.module, replacement.name, replacement.value)
        if replacement.grad is not None:
            new.grad = shard_like(replacement.grad, old.grad)
        if optimizer is not None:
            swap_parameter(optimizer, old, new, state)
