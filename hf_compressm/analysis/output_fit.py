"""The kept states of a layer learn to give the output of all of them, on calibration data.

With y the scan of all N states of a Mamba-1 layer and y' that of the r kept ones, on the same u and Δ, gated by z,

    minimise  Σ_t ‖W_out (silu(z_t) ⊙ (y'_t − y_t))‖²

over the rows that make B and C, (r, D) each, and log(-A), (D, r). That sum is the error that the cut makes in what the
layer adds to the residual stream, cross terms included. In a layer with scalar decay a gated norm lies between, and
what is fitted are the channels of B and C, or the projections. L-BFGS on all data needs no learning rate and draws
nothing at random.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..theory.selective import StateMaps, well_posed

ROUND, ROUNDS = 10, 6  # steps of L-BFGS in a round, after which other data decide, and how many rounds at most
WORTHWHILE = 0.02  # another round follows one that lowered the error by this share of it
PAIRS = 20  # how many pairs of steps and gradients L-BFGS remembers

Maps = TypeVar("Maps")  # what a fit moves: `StateMaps`, or tensors by path


class OutputError(Generic[Maps]):
    """An output error is what kept states get wrong in a layer's output, as a share of the energy of that of all.

    Args:
        whole: the maps of all N states.
        output: maps, inputs → what the layer adds to the residual stream, (batch, hidden, L), differentiable.
        data: inputs by batch; each says by `mask` which tokens count, (batch, L), or None.
        sum_in_place: replaces tensors by their sums over all processes.
    """

    def __init__(
        self,
        whole: Maps,
        output: Callable[[Maps, Any], Tensor],
        data: list,
        sum_in_place: Callable[[list[Tensor]], None],
    ):
        self.output, self.data, self.sum_in_place = output, data, sum_in_place
        with torch.no_grad():
            self.targets = [self._output(whole, inputs) for inputs in data]
            self.energy = torch.stack([target.square().sum() for target in self.targets]).sum()
            sum_in_place([self.energy])

    @torch.no_grad()
    def relative_error(self, maps: Maps) -> float:
        """Return the error with these maps of the kept states."""
        pairs = zip(self.data, self.targets, strict=True)
        error = torch.stack([(self._output(maps, inputs) - target).square().sum() for inputs, target in pairs]).sum()
        self.sum_in_place([error])
        return float(error / self.energy)

    def backward(self, maps: Maps, leaves: list[Tensor]) -> Tensor:
        """Return the error, (), of maps that are made of these leaves, and give the leaves its gradients."""
        total = torch.zeros_like(self.energy)
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        for inputs, target in zip(self.data, self.targets, strict=True):  # one batch at a time holds little memory
            error = (self._output(maps, inputs) - target).square().sum() / self.energy
            error.backward(inputs=leaves, retain_graph=True)
            total += error.detach()
        self.sum_in_place([total, *(leaf.grad for leaf in leaves)])
        return total

    def _output(self, maps: Maps, inputs) -> Tensor:
        """Return what these states add to the residual stream at the tokens that count, (batch, hidden, L)."""
        output = self.output(maps, inputs)
        return output if inputs.mask is None else output * inputs.mask.unsqueeze(1)


def fit_states(error: OutputError, held_out: OutputError, start: StateMaps, covariance: Tensor) -> StateMaps:
    """Fit the maps of a Mamba-1 layer; see `fit_maps`.

    Args:
        start: the maps of the kept states to begin with.
        covariance: Π of the kept states, (r, r). Rows of C are fitted in the basis in which these are uncorrelated, so
            that steps of one length change the output alike.
    """
    basis = torch.linalg.cholesky(well_posed(covariance)).mT.to(start.C_rows)  # Rᵀ of Π = R Rᵀ
    values = replace(start, C_rows=basis @ start.C_rows)
    sizes = {name: vars(values)[name].square().mean().sqrt().clamp_min(1e-12) for name in ("B_rows", "C_rows")}
    units = replace(values.map(lambda value: value.new_ones(())), **sizes)
    leaves = values.map(lambda value, unit: (value / unit).requires_grad_(), units)

    def maps() -> StateMaps:
        found = leaves.map(torch.mul, units)
        return replace(found, C_rows=torch.linalg.solve_triangular(basis, found.C_rows, upper=True))

    return fit_maps(error, held_out, start, list(leaves), maps)


def fit_maps(
    error: OutputError, held_out: OutputError, start: Maps, leaves: list[Tensor], maps: Callable[[], Maps]
) -> Maps:
    """Fit maps by L-BFGS from `start` while they get better on other data; return `start` if they never do.

    Args:
        error: the error on the data to fit to.
        held_out: the error on other data; every `ROUND` steps it decides whether to go on.
        start: the maps to begin with.
        leaves: what is fitted: at first such that `maps` gives those of `start`.
        maps: makes maps of the leaves as they are.
    """

    def evaluate() -> Tensor:
        with torch.enable_grad():
            return error.backward(maps(), leaves)

    settings = {"max_iter": ROUND, "max_eval": ROUND * 5 // 4, "history_size": PAIRS}
    optimizer = torch.optim.LBFGS(leaves, line_search_fn="strong_wolfe", **settings)
    best, smallest = start, held_out.relative_error(start)
    for _ in range(ROUNDS):
        optimizer.step(evaluate)
        with torch.no_grad():
            reached = maps()
        found = held_out.relative_error(reached)
        best = reached if found < smallest else best
        if not found < (1 - WORTHWHILE) * smallest:
            break
        smallest = found
    return best
