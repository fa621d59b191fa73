"""The arguments of a scan are checked by name before anything is computed."""

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def states_dtype(given: Mapping[str, Tensor | None]) -> torch.dtype:
    """Return the dtype in which a scan of these arguments keeps its states: float64 if any is, else float32.

    Raises:
        ValueError: a dtype is none of the four of floating point.
    """
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, DTYPES))}.")
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    return torch.float64 if is_double else torch.float32


def check_shapes(given: Mapping[str, Tensor | None], expected: Mapping[str, tuple[int, ...]], first: str) -> None:
    """Refuse an argument of another shape than expected; an argument may be missing.

    Args:
        first: the name of the argument that the expected shapes follow from.

    Raises:
        ValueError: a shape is another one.
    """
    for name, shape in expected.items():
        tensor = given[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for {first} of shape "
                f"{tuple(given[first].shape)}."
            )
