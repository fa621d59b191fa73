"""What a layer with a state costs is counted here, for the card: parameters, and numbers that a sequence carries.

There is no mixer to ask, as in a checkpoint: shapes and the content of a `config.json` have to do.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]  # of the state tensors of a layer, by path


class StateCounts(ABC):
    """State counts are numbers that a family knows of its layers without a model."""

    @abstractmethod
    def values_per_state(self, config: Mapping) -> int:
        """Return how many numbers a sequence carries for each state of a layer, by the content of a `config.json`."""

    def convolution_values(self, config: Mapping, size: int) -> int:
        """Return how many past inputs of its convolution a layer of `size` states keeps for a sequence; here none."""
        return 0

    def parameters_per_state(self, shapes: Shapes, config: Mapping) -> int:
        """Return how many parameters each state of a layer has.

        As in `size_in_weights`, there is no mixer to ask: a family with groups has to override this method.
        """
        return sum(
            sum(block.per_state for block in self.tensors[path].blocks)
            * math.prod(shape)
            // shape[self.tensors[path].axis]
            for path, shape in shapes.items()
        )

    def removed_parameters(self, shapes: Shapes, config: Mapping, states: int) -> int:
        """Return how many parameters a layer has lost with this number of states; a negative number where it has more.

        Args:
            shapes: those that it has now.
        """
        return states * self.parameters_per_state(shapes, config)
