"""A time-invariant family has layers that balanced truncation replaces by smaller ones, from their weights alone."""

from abc import abstractmethod

from torch import Tensor, nn

from ..family import ProjectedFamily


class TimeInvariantFamily(ProjectedFamily):
    """A time-invariant family has diagonal layers, whose system balanced truncation replaces by a smaller one."""

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
