"""A plan says what becomes of each layer: an entry keeps some of its states, or gives it a smaller system."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .selective import StateMaps, complement


@dataclass(frozen=True)
class Selection:
    """A selection says which states of one layer are kept, and how they make up for the others.

    Attributes:
        kept_states: indices of the states that stay, sorted, (r,).
        compensation: the map G by which kept states predict dropped ones, (N - r, r), or None.
        refit: what a refit adds to the maps of the kept states in the end, or None.
        norm_gains: what B and C are multiplied by before that, (2,), where they are normalised over the states; or
            None.
    """

    kept_states: Tensor
    compensation: Tensor | None = None
    refit: StateMaps | None = None
    norm_gains: Tensor | None = None

    starts_afresh = False  # the kept states are those of before, and so are their moments

    @property
    def size(self) -> int:
        """Return how many states stay."""
        return len(self.kept_states)

    @property
    def is_refitted(self) -> bool:
        """Return whether a refit added something."""
        return self.refit is not None

    @property
    def heads(self) -> tuple["Selection"]:
        """Return what becomes of each head: here of the only one."""
        return (self,)

    def with_refits(self, refits: Sequence[StateMaps | None]) -> "Selection":
        """Return the same entry with what a refit adds to each head, or None: here to the only one."""
        return replace(self, refit=refits[0])

    def cpu(self) -> "Selection":
        """Return the same entry on the CPU."""
        parts = {name: None if part is None else part.cpu() for name, part in vars(self).items() if name != "refit"}
        return Selection(**parts, refit=None if self.refit is None else self.refit.map(Tensor.cpu))

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Return all that the entry says beside the kept states, by name."""
        added = {} if self.refit is None else vars(self.refit)
        return {"compensation": self.compensation, "norm_gains": self.norm_gains, **added}

    def maps_after_cut(self, whole: StateMaps) -> StateMaps:
        """Return the maps of the kept states as the cut leaves them.

        They are W_C[K] + Gᵀ W_C[R], scaled where they are normalised, plus what a refit adds.

        Args:
            whole: the maps of all states.
        """
        kept_states = self.kept_states.to(whole.B_rows.device)
        maps = whole.kept(kept_states)
        if self.compensation is not None:
            dropped = whole.C_rows[complement(kept_states, len(whole.C_rows))].double()
            C_rows = maps.C_rows.double() + self.compensation.to(dropped).mT @ dropped
            maps = replace(maps, C_rows=C_rows.to(maps.C_rows.dtype))
        if self.norm_gains is not None:
            maps = maps.scaled(*self.norm_gains.to(maps.C_rows))
        if self.refit is not None:
            maps = maps.map(lambda kept, added: kept + added.to(kept), self.refit)
        return maps


@dataclass(frozen=True)
class GroupSelection:
    """A group selection says which states each group of heads of one layer keeps; it drops equally many in each.

    Attributes:
        kept_states: indices of the states that stay, sorted in each group, (G, r).
        tensors: what a refit adds to the tensors of the kept states, by path: to their entries of B and C alone, which
            lie side by side, 2 G r along the state axis. Empty without one.
    """

    kept_states: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    starts_afresh = False

    @property
    def size(self) -> int:
        """Return how many states of each group stay."""
        return self.kept_states.shape[1]

    @property
    def is_refitted(self) -> bool:
        """Return whether a refit added something."""
        return bool(self.tensors)

    def cpu(self) -> "GroupSelection":
        """Return the same entry on the CPU."""
        return GroupSelection(self.kept_states.cpu(), {path: tensor.cpu() for path, tensor in self.tensors.items()})


@dataclass(frozen=True)
class HeadSelection:
    """A head selection says what each head of one layer keeps, where heads have a B and a C of their own.

    Attributes:
        heads: what becomes of each head; all keep equally many states.
    """

    heads: tuple[Selection, ...]
    starts_afresh = False

    @property
    def kept_states(self) -> Tensor:
        """Return the indices of the states that stay, sorted for each head, (heads, r)."""
        return torch.stack([head.kept_states for head in self.heads])

    @property
    def size(self) -> int:
        """Return how many states of each head stay."""
        return self.heads[0].size

    @property
    def is_refitted(self) -> bool:
        """Return whether a refit added something to a head."""
        return any(head.is_refitted for head in self.heads)

    def with_refits(self, refits: Sequence[StateMaps | None]) -> "HeadSelection":
        """Return the same entry with what a refit adds to each head, or None."""
        return HeadSelection(tuple(replace(head, refit=refit) for head, refit in zip(self.heads, refits, strict=True)))

    def cpu(self) -> "HeadSelection":
        """Return the same entry on the CPU."""
        return HeadSelection(tuple(head.cpu() for head in self.heads))

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Return all that the entry says beside the kept states, by head and name."""
        return {f"{i}.{name}": tensor for i, head in enumerate(self.heads) for name, tensor in head.tensors.items()}


@dataclass(frozen=True)
class Projection:
    """A projection gives one layer new tensors for its balanced states.

    Attributes:
        kept_states: indices of the balanced states that stay, sorted, (r,).
        tensors: the new state tensors, by path.
        is_refitted: whether a refit made them, from those that balancing gives.
    """

    kept_states: Tensor
    tensors: dict[str, Tensor]
    is_refitted: bool = False
    starts_afresh = True  # old moments know nothing of the new coordinates

    @property
    def size(self) -> int:
        """Return how many balanced states stay."""
        return len(self.kept_states)

    def cpu(self) -> "Projection":
        """Return the same entry on the CPU."""
        tensors = {path: tensor.cpu() for path, tensor in self.tensors.items()}
        return replace(self, kept_states=self.kept_states.cpu(), tensors=tensors)


PlanEntry = Selection | HeadSelection | GroupSelection | Projection
Plan = dict[int, PlanEntry]  # by layer index


def plan_fingerprint(plan: Plan) -> str:
    """Return a text that is the same for equal plans only."""
    digest = hashlib.sha256()
    for index, entry in plan.items():
        for name, tensor in {"kept_states": entry.kept_states, **entry.tensors}.items():
            digest.update(f"{index} {name}".encode())
            digest.update(b"" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
