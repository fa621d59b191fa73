"""The kept states of a selective layer learn to give the output of all of them, on calibration data.

With y the scan of all N states and y' that of the r kept ones, on the same u and Δ, gated by the same z,

    minimise  Σ_t ‖W_out (silu(z_t) ⊙ (y'_t − y_t))‖²

over the rows that make B and C, (r, D) each, and log(-A), (D, r). The sum is the error that the cut makes in what the
layer adds to the residual stream, cross terms included. L-BFGS on all data needs no learning rate and draws nothing at
random.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import selective_scan
from .selective import StateMaps

STEPS = 40  # of L-BFGS; a quarter more evaluations
PAIRS = 20  # of steps and gradients that it remembers


@dataclass(frozen=True)
class LayerInputs:
    """What the scan of a layer is given.

    Attributes:
        u, time_step: input and effective Δ, (batch, D, L).
        gate: z, (batch, D, L), or None.
        mask: 1 for tokens that count, 0 for padding, (batch, L), or None.
    """

    u: Tensor
    time_step: Tensor
    gate: Tensor | None
    mask: Tensor | None


class OutputError:
    """The error that the kept states make in a layer's output, as a share of the energy of the output of all.

    Args:
        whole: maps of all N states.
        output_projection: W_out, (hidden, D).
        data: inputs by batch.
        summed: replaces tensors by their sums over all processes, in place.
    """

    def __init__(
        self,
        whole: StateMaps,
        output_projection: Tensor,
        data: list[LayerInputs],
        summed: Callable[[list[Tensor]], None],
    ):
        self.output_projection, self.data, self.summed = output_projection.float(), data, summed
        with torch.no_grad():
            self.targets = [self._output(whole, inputs) for inputs in data]
            self.energy = torch.stack([target.square().sum() for target in self.targets]).sum()
            summed([self.energy])

    @torch.no_grad()
    def of(self, maps: StateMaps) -> float:
        """The error with these maps of the kept states."""
        pairs = zip(self.data, self.targets, strict=True)
        error = torch.stack([(self._output(maps, inputs) - target).square().sum() for inputs, target in pairs]).sum()
        self.summed([error])
        return float(error / self.energy)

    @torch.enable_grad()
    def minimised(self, start: StateMaps) -> StateMaps:
        """The maps that L-BFGS reaches from `start`, each in units of its own size."""
        units = [start.B_rows.square().mean().sqrt(), start.C_rows.square().mean().sqrt(), torch.ones(())]
        unknowns = [(value / unit).requires_grad_() for value, unit in zip(start, units, strict=True)]
        settings = {"max_iter": STEPS, "max_eval": STEPS * 5 // 4, "history_size": PAIRS}
        optimizer = torch.optim.LBFGS(unknowns, line_search_fn="strong_wolfe", **settings)

        def maps() -> StateMaps:
            return StateMaps(*(value * unit for value, unit in zip(unknowns, units, strict=True)))

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros_like(self.energy)
            for inputs, target in zip(self.data, self.targets, strict=True):  # a batch at a time, to hold little
                error = (self._output(maps(), inputs) - target).square().sum() / self.energy
                error.backward()
                total += error.detach()
            self.summed([total, *(value.grad for value in unknowns)])
            return total

        optimizer.step(evaluate)
        return StateMaps(*(value.detach() for value in maps()))

    def _output(self, maps: StateMaps, inputs: LayerInputs) -> Tensor:
        """What these states add to the residual stream, (batch, hidden, L), in float32."""
        with torch.autocast(inputs.u.device.type, enabled=False):
            u = inputs.u.float()
            B, C = torch.einsum("nd,bdl->bnl", maps.B_rows, u), torch.einsum("nd,bdl->bnl", maps.C_rows, u)
            y = selective_scan(u, inputs.time_step.float(), -maps.A_log.exp(), B, C)
            y = y if inputs.gate is None else y * F.silu(inputs.gate.float())
            output = torch.einsum("hd,bdl->bhl", self.output_projection, y)
            return output if inputs.mask is None else output * inputs.mask.unsqueeze(1)
