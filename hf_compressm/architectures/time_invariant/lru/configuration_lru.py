"""`LRUConfig` configures the Linear Recurrent Unit."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class LRUConfig(PreTrainedConfig):
    """The configuration holds the sizes and the initialisation of an LRU model (Orvieto et al., arXiv 2303.06349).

    Args:
        vocab_size: number of tokens, for `input_ids`; None for sequences of values, `input_values`.
        num_channels: values per position, for `input_values`.
        hidden_size: H, width of the residual stream: inputs and outputs of every LRU.
        state_size: N, complex states of every layer; a list with one N for each layer where they differ.
        num_hidden_layers: number of blocks.
        r_min, r_max: the ring in which the initial eigenvalues lie, 0 ≤ r_min < r_max < 1.
        max_phase: largest phase of an initial eigenvalue, in radians, 0 … 2π.
        hidden_dropout_prob: dropout after each block's gate.
        layer_norm_epsilon: ε of the norm before each LRU.

    Raises:
        ValueError: the sizes, the ring or the phase are impossible.
    """

    model_type = "lru"

    vocab_size: int | None = None
    num_channels: int = 1
    hidden_size: int = 64
    state_size: int | list[int] = 256
    num_hidden_layers: int = 6
    r_min: float | int = 0.9
    r_max: float | int = 0.999
    max_phase: float | int = 2 * math.pi
    hidden_dropout_prob: float | int = 0.1
    layer_norm_epsilon: float | int = 1e-5
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if len(self.state_sizes) != self.num_hidden_layers or min(self.state_sizes, default=0) < 1:
            raise ValueError(
                f"state_size = {self.state_size} for {self.num_hidden_layers} layers; give a number, or a list with "
                "one for each layer, all at least 1."
            )
        if not 0 <= self.r_min < self.r_max < 1:
            raise ValueError(f"r_min = {self.r_min}, r_max = {self.r_max}; allowed: 0 ≤ r_min < r_max < 1.")
        if not 0 <= self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase = {self.max_phase}; allowed: 0 … 2π radians.")
        super().__post_init__(**kwargs)

    @property
    def state_sizes(self) -> list[int]:
        """Return N of each layer."""
        return self.state_size if isinstance(self.state_size, list) else [self.state_size] * self.num_hidden_layers
