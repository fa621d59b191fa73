"""The loss of a model as a plan would leave it is measured here without touching the model."""

import math
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..architectures import StateLayers
from ..engines import from_first_process, is_sharded, raise_in_all_processes, sum_over_processes
from ..theory.plan import Plan
from .calibration import predictions, sequence_count
from .collate import Batch
from .masking import masked_parameters
from .objective import HALVES, Objective


class LossMeter:
    """A loss meter measures, on held-out batches of all processes, the loss of a model as a plan would leave it."""

    def __init__(self, layers: StateLayers, batches: list[Batch], objective: Objective):
        self.layers, self.batches, self.objective, self.seconds = layers, batches, objective, 0.0
        self._measured: dict[tuple[int, ...], float] = {}
        self._of_sample: float | None = None

    def loss(self, plan: Plan) -> float:
        """Return the mean loss over all batches, nats per prediction; plans of the same sizes are measured once."""
        key = tuple(entry.size for entry in plan.values())
        if key not in self._measured:
            overrides = masked_parameters(self.layers, plan)
            unchanged = plan and not overrides
            self._measured[key] = self.loss({}) if unchanged else self._mean_loss(self.batches, overrides)
        return self._measured[key]

    def single_layer_change(self, index: int, plan: Plan) -> float:
        """Return the change of the loss when only this layer is cut, nats per prediction.

        It is measured on so few sequences that all layers together cost about one batch.
        """
        overrides = masked_parameters(self.layers, {index: plan[index]})
        if not overrides:
            return 0.0
        sample = [_every_other_sequence(self.batches[0], len(plan))]
        if self._of_sample is None:
            self._of_sample = self._mean_loss(sample, {})
        return self._mean_loss(sample, overrides) - self._of_sample

    def _mean_loss(self, batches: list[Batch], overrides: dict[str, Tensor | int]) -> float:
        started = time.perf_counter()
        loss = mean_loss(self.objective, batches, overrides)
        self.seconds += time.perf_counter() - started
        return loss


def mean_loss(objective: Objective, batches: list[Batch], overrides: dict[str, Tensor | int]) -> float:
    """Return the mean loss over these batches in all processes, with overridden parameters.

    Raises:
        ValueError: the loss is not finite.
    """
    with raise_in_all_processes():
        losses, counts = [], []
        for batch in batches:
            loss, count = objective.loss(batch, overrides)
            losses.append(loss.item())
            counts.append(count)
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError(
                "the loss on the calibration batches is NaN or Inf: training has diverged. Nothing was changed."
            )
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    device = next(objective.model.parameters()).device
    sums = torch.tensor([total, sum(counts)], dtype=torch.float64, device=device)
    sum_over_processes([sums])
    return from_first_process(float(sums[0] / sums[1]))  # all have to go on with the very same number


def _every_other_sequence(batch: Batch, stride: int) -> Batch:
    """Return one in `stride` of the sequences with predictions, so that several processes sample what one would."""
    count = sequence_count(batch)
    if "labels" in batch:
        predicted = predictions(batch)
        rows = predicted.reshape(len(predicted), -1).any(1).nonzero().squeeze(1)[::stride]
    else:
        rows = torch.arange(0, count, stride)
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in batch.items()
    }


def loss_gradients(objective: Objective, batches: list[Batch], names: Iterable[str]) -> dict[str, Tensor]:
    """Return parameter name → gradient of the mean loss over these batches in all processes, float64.

    No gradient stays behind in the model.

    Raises:
        ValueError: the model is sharded.
    """
    check_gradients(objective.model)
    weights = {name: objective.model.get_parameter(name).detach() for name in names}
    leaves = {name: (w.float() if w.dtype in HALVES else w).requires_grad_() for name, w in weights.items()}
    gradients = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    terms = next(iter(gradients.values())).new_zeros(())
    with raise_in_all_processes(), torch.enable_grad():
        for batch in batches:
            loss, count = objective.loss(batch, leaves)
            terms += count
            total = loss * count  # a sum does not underflow in half
            for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
                gradients[name] += gradient
    sum_over_processes([*gradients.values(), terms])
    return {name: gradient / terms for name, gradient in gradients.items()}


def check_gradients(model: nn.Module) -> None:
    """Refuse a model whose gradients cannot be taken without disturbing its training.

    Raises:
        ValueError: FSDP2 holds its parameters, and reduces and keeps whatever gradients it meets.
    """
    if is_sharded(model):
        raise ValueError(
            "a criterion that needs gradients, such as 'taylor', cannot have them under FSDP2. Use another criterion, "
            "DistributedDataParallel or one process."
        )
