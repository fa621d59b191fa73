"""What the library knows of the Linear Recurrent Unit."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..family import StateTensor, TimeInvariantFamily


class LRUFamily(TimeInvariantFamily):
    """Linear Recurrent Units (arXiv 2303.06349): time-invariant, so the theory is exact."""

    model_types = ("lru",)
    mixer_class = "LRUMixer"
    size_attribute = "state_size"
    tensors = {  # noqa: RUF012
        "nu_log": StateTensor(axis=0),
        "theta_log": StateTensor(axis=0),
        "gamma_log": StateTensor(axis=0),
        "B": StateTensor(axis=0),
        "C": StateTensor(axis=1),
    }
    title = "Linear Recurrent Unit"

    def is_per_layer(self, model: nn.Module) -> bool:
        """The config holds a list of sizes where they differ."""
        return True

    def check_per_layer(self, model: nn.Module) -> None:
        """Every model can be saved so."""

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """One number where all layers have one size, else a list."""
        different = list(sizes.values())
        model.config.state_size = different[0] if len(set(different)) == 1 else different

    def system(self, mixer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """The system whose real part the layer gives."""
        return mixer.system()

    def tensors_of(self, mixer: nn.Module, eigenvalues: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """The parameters as the layer keeps them."""
        return mixer.parameters_of(eigenvalues, B, C)

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """All parameters of the recurrence."""
        return mixer.parameters()

    def values_per_state(self, config: Mapping) -> int:
        """A complex number."""
        return 2


LRU = LRUFamily()
