"""The family of the Linear Recurrent Unit connects its modules with the mathematics of `theory.hankel`."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ...family import StateTensor
from ..family import TimeInvariantFamily


class LRUFamily(TimeInvariantFamily):
    """Linear Recurrent Units (arXiv 2303.06349) are time-invariant, so the theory is exact."""

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
        """Return True: every model can have a size for each layer, since its config holds a list where they differ."""
        return True

    def check_per_layer(self, model: nn.Module) -> None:
        """Accept every model, since each can be saved with a size for each layer."""

    def record_in_model(self, model: nn.Module, sizes: dict[int, int]) -> None:
        """Write one number into the config where all layers have one size, else a list."""
        different = list(sizes.values())
        model.config.state_size = different[0] if len(set(different)) == 1 else different

    def system(self, mixer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the complex system (λ, γB, C) whose real part is the output of the layer, but for its term D u."""
        return mixer.system()

    def tensors_of(self, mixer: nn.Module, eigenvalues: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """Return ν, θ, γ, B and C as the layer keeps them."""
        return mixer.parameters_of(eigenvalues, B, C)

    def undecayed(self, mixer: nn.Module) -> Iterator[nn.Parameter]:
        """Yield all parameters of the recurrence."""
        return mixer.parameters()

    def values_per_state(self, config: Mapping) -> int:
        """Return 2: a state is one complex number."""
        return 2


LRU = LRUFamily()
