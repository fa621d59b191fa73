"""A resized tensor is a new Parameter; this module is the one place that says what a Parameter carries besides values.

| carried by a Parameter | what becomes of it |
|---|---|
| value, gradient, its part of an optimizer's state | `surgery` resizes them |
| `requires_grad`, `grad_dtype` | taken over |
| attributes that were set on it: its `__dict__` | taken over |
| hooks on its gradient (`register_hook`, `register_post_accumulate_grad_hook`) | refused |
| a class that is derived from `nn.Parameter` | refused |

Hooks lie outside `__dict__`. They are refused because what they close over, such as a mask, may have the old shape.
Two things cannot be seen from a Parameter: hooks on the node of autograd that accumulates its gradient, as
DistributedDataParallel has them, and what other objects keep of it, as optimizers and running averages do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def new_parameter_like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Return a Parameter that holds `value`, with what `old` carries."""
    return carry_over(old, nn.Parameter(value.contiguous()))


def carry_over(old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    """Give `new` what `old` carries besides its values, and return it."""
    new.requires_grad_(old.requires_grad)
    if old.grad_dtype != old.dtype:
        new.grad_dtype = old.grad_dtype
    for name, value in vars(old).items():
        vars(new).setdefault(name, value)
    return new


def check_replaceable(name: str, parameter: nn.Parameter) -> None:
    """Refuse a parameter that carries what a new one could not be given.

    Args:
        name: what the error calls it.

    Raises:
        ValueError: hooks hang on the parameter, or its class is derived from `nn.Parameter`.
    """
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"{name} carries gradient hooks (a layer-wise optimizer, wandb.watch, a mask?), which may not fit the "
            "new shape: remove them before a cut and set them again after it."
        )
    if type(parameter) not in (nn.Parameter, DTensor):
        raise ValueError(
            f"{name} is a {type(parameter).__name__}, and a resized one would be a plain nn.Parameter; make it one."
        )


@contextmanager
def unused_frozen(model: nn.Module) -> Iterator[None]:
    """Freeze within this block the parameters that a model says it does not use, while an optimizer is loaded.

    They have no gradient, and so no state in a checkpoint. FSDP2 would miss it of a parameter that can be trained.
    """
    names = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    unused = [parameter for parameter in map(model.get_parameter, names) if parameter.requires_grad]
    for parameter in unused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in unused:
            parameter.requires_grad_(True)
