"""A plain model is prepared for the basis "balanced": in place it becomes the balanced class that computes the same.

Every layer then has the projections `B_proj` and `C_proj`: identities, which are not used before a cut makes them
smaller, so that the model stays as it was, bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..architectures import StateLayers, state_layers
from ..architectures.recorded_sizes import record_state_sizes
from ..architectures.scalar_decay.balanced import balance_modules
from ..architectures.scalar_decay.mamba2 import AxisFamily, can_be_balanced
from ..engines import Engine, is_sharded, unwrap
from .optimizer_parts import OptimizerParts
from .undo import Undo


def prepare(model: nn.Module, optimizer=None) -> None:
    """Turn a model, in place, into one that can be cut in the basis "balanced"; one that is so already stays as it is.

    Call it before DistributedDataParallel, FSDP2 or an optimizer is given the model, so that all know its new
    parameters from the start and a run can be resumed; `CompreSSMCallback` does so by itself. `compress` does it where
    that was not done, in one process and under DistributedDataParallel.

    Args:
        model: a supported Transformers model.
        optimizer: the optimizer that trains the model already, if one does. The new parameters join its groups that
            hold `A_log`, which are not decayed in the groups of `parameter_groups`.

    Raises:
        ValueError: the model has no balanced basis, is of a class derived from Transformers', or is sharded by FSDP2.
    """
    layers = state_layers(unwrap(model))
    if "balanced" not in layers.family.bases:
        raise ValueError(
            f"a model of type '{layers.model.config.model_type}' has no balanced basis; allowed: "
            f"{', '.join(layers.family.bases)}. There is nothing to prepare."
        )
    if not needs_preparation(layers, "balanced"):
        return
    with Undo([Engine(model, trains=False)], [OptimizerParts(optimizer)]):
        _balance(layers)
        for part in OptimizerParts(optimizer).groups.values():
            held = set(part["params"])
            joining = [
                projection
                for mixer in layers.values()
                if mixer.A_log in held
                for projection in (mixer.B_proj, mixer.C_proj)
            ]
            part["params"] = [*part["params"], *joining]


def needs_preparation(layers: StateLayers, basis: str | None) -> bool:
    """Return whether a model has to change its class before it can be cut in this basis."""
    return basis == "balanced" and isinstance(layers.family, AxisFamily)


@contextmanager
def in_basis(model: nn.Module, basis: str | None) -> Iterator[StateLayers]:
    """Give a block the state layers of an unwrapped model in a basis; afterwards the model is as it was before.

    Raises:
        ValueError: the model has no such basis, or would have to be prepared for it and cannot.
    """
    layers = state_layers(model)
    if not needs_preparation(layers, basis):
        yield layers
        return
    undo = Undo([Engine(model, trains=False)])
    try:
        _balance(layers)
        yield state_layers(model)
    finally:
        undo.undo()


@contextmanager
def prepared_for(basis: str | None, model: nn.Module, optimizer, companions: Sequence[nn.Module]) -> Iterator[None]:
    """Prepare a model and its companions for a cut in a block, which undoes that, too, if an exception ends it.

    Args:
        model, companions: the models as their engines hold them.
    """
    layers = state_layers(unwrap(model))
    if not needs_preparation(layers, basis):
        yield
        return
    engines = [Engine(model), *(Engine(companion, trains=False) for companion in companions)]
    with Undo(engines, [OptimizerParts(optimizer)]):
        prepare(model, optimizer)
        for companion in companions:
            prepare(companion)
        yield


def _balance(layers: StateLayers) -> None:
    model = layers.model
    if is_sharded(model):
        raise ValueError(
            "FSDP2 holds the parameters of the model, and cannot take new ones: call hf_compressm.prepare(model) "
            "before the model is wrapped."
        )
    if not can_be_balanced(model):
        raise ValueError(
            f"a {type(model).__name__} has no balanced class: its class is derived from one of Transformers', or is "
            "not a language model. Use basis='axis'."
        )
    balance_modules(model)
    prepared = StateLayers(model)
    record_state_sizes(prepared, prepared.sizes)
