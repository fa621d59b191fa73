"""How many states each layer keeps: from energies and measured losses to a size per layer. No model, no surgery."""

from collections.abc import Callable

from torch import Tensor

from .config import CompreSSMConfig
from .hankel import truncation_rank

Sizes = dict[int, int]


def choose_sizes(
    config: CompreSSMConfig, energies: dict[int, Tensor], uniform: bool, loss_of: Callable[[Sizes], float] | None
) -> Sizes:
    """Layer → N that the configuration asks for.

    Args:
        energies: layer → energy of each state, (N,), in any order.
        uniform: one size for all layers, the largest any layer asks for.
        loss_of: sizes → measured loss of the model cut to them; needed by a loss budget.
    """
    sizes = {index: len(energy) for index, energy in energies.items()}
    energies = {index: energy for index, energy in energies.items() if index not in config.skip_layers}
    if config.target_state_size is not None:
        wanted = dict.fromkeys(sizes, config.target_state_size)
    elif config.cut_fraction is not None:
        largest = max(sizes.values())
        wanted = {
            index: config.round_up((largest if uniform else size) * (1 - config.cut_fraction))
            for index, size in sizes.items()
        }
    elif config.loss_budget is not None:
        wanted = _smallest_within_budget(config, _Candidates(config, energies, uniform), loss_of)
    else:
        wanted = _gated(config, sizes, _by_tolerance(config, energies, uniform, config.tolerance), uniform)
    return sizes | {index: min(sizes[index], wanted[index]) for index in energies}


def _by_tolerance(config: CompreSSMConfig, energies: dict[int, Tensor], uniform: bool, tolerance: float) -> Sizes:
    """Each layer's rank, or the largest of them."""
    ranks = {
        index: min(config.round_up(truncation_rank(energy.sort(descending=True).values, tolerance, 0.0)), len(energy))
        for index, energy in energies.items()
    }
    return dict.fromkeys(ranks, max(ranks.values())) if uniform else ranks


def _gated(config: CompreSSMConfig, sizes: Sizes, wanted: Sizes, uniform: bool) -> Sizes:
    """A layer is cut only where enough of it goes; with one size for all, all are judged by the largest."""
    largest = max(sizes.values())
    return {
        index: size if size < (1 - config.min_reduction) * (largest if uniform else sizes[index]) else sizes[index]
        for index, size in wanted.items()
    }


class _Candidates:
    """The sizes that a loss budget chooses from, behind the gate, smallest first; the last is the model as it is.

    One size for all: every allowed N. A size per layer: those of one tolerance for all layers, from large to small.
    """

    def __init__(self, config: CompreSSMConfig, energies: dict[int, Tensor], uniform: bool):
        self.config, self.uniform = config, uniform
        self.whole = {index: len(energy) for index, energy in energies.items()}
        if uniform:
            self.steps = range(config.round_up(1), max(self.whole.values()), config.multiple_of)
        else:
            self.shares = {index: _tail_shares(energy) for index, energy in energies.items()}
            self.steps = sorted({share for shares in self.shares.values() for share in shares[1:]}, reverse=True)

    def __len__(self) -> int:
        return len(self.steps) + 1

    def __getitem__(self, position: int) -> Sizes:
        if position == len(self.steps):
            return self.whole
        step = self.steps[position]
        if self.uniform:
            wanted = dict.fromkeys(self.whole, step)
        else:
            ranks = {index: sum(share > step for share in shares) for index, shares in self.shares.items()}
            wanted = {index: self.config.round_up(rank) for index, rank in ranks.items()}
        return _gated(self.config, self.whole, wanted, self.uniform)


def _tail_shares(energy: Tensor) -> list[float]:
    """The share of the energy that is lost by keeping r states, for r = 0 … N - 1, descending."""
    tails = energy.sort().values.cumsum(0)
    return (tails / tails[-1].clamp_min(1e-300)).flip(0).tolist()


def _smallest_within_budget(
    config: CompreSSMConfig, candidates: _Candidates, loss_of: Callable[[Sizes], float]
) -> Sizes:
    """Sizes whose measured loss keeps the budget while the next smaller ones break it (bisection), or the floor."""
    allowed = loss_of(candidates.whole) + config.loss_budget
    breaks, keeps = -1, len(candidates) - 1
    while keeps - breaks > 1:
        middle = (breaks + keeps) // 2
        if loss_of(candidates[middle]) <= allowed:
            keeps = middle
        else:
            breaks = middle
    return candidates[keeps]
