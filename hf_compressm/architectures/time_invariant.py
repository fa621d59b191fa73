"""A time-invariant family has layers that balanced truncation replaces by smaller ones, from their weights alone."""

from abc import abstractmethod

from torch import Tensor, nn

from ..theory.plan import Projection
from .family import Family


class TimeInvariantFamily(Family):
    """A time-invariant family has diagonal layers, whose system balanced truncation replaces by a smaller one.

    The cut layer has new coordinates, so its gradients and its optimizer state start afresh.
    """

    needs_data = False
    is_language_model = False
    bases = ("balanced",)

    @abstractmethod
    def system(self, mixer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the system of a layer, h_k = λ h_{k-1} + B u_k, y_k = C h_k, or one whose real part the layer gives.

        The parameters of the mixer are whole tensors during this call.

        Returns:
            λ, (N,), B, (N, H_in), and C, (H_out, N), complex128.
        """

    @abstractmethod
    def tensors_of(self, mixer: nn.Module, eigenvalues: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """Return the state tensors, float64, by path, of a layer that has this system: the inverse of `system`."""

    def reduce(self, entry: Projection, mixer: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        """Copy the tensors of the smaller system into `new`."""
        for path in entry.tensors:
            new[path].copy_(entry.tensors[path])

    def masked(self, mixer: nn.Module, entry: Projection) -> dict[str, Tensor]:
        """Return the tensors of the smaller system: a layer computes at the size of the tensors that it is given."""
        parameters = {path: mixer.get_parameter(path) for path in entry.tensors}
        return {path: entry.tensors[path].to(old.device, old.dtype) for path, old in parameters.items()}
