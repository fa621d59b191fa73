"""A plan says what becomes of each layer: an entry keeps some of its states, or gives it a smaller system."""

import hashlib
from dataclasses import dataclass, replace

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
    def is_refitted(self) -> bool:
        """Return whether a refit added something."""
        return self.refit is not None

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
class Projection:
    """A projection gives one layer new `tensors`, by path, for its balanced states `kept_states`, sorted, (r,)."""

    kept_states: Tensor
    tensors: dict[str, Tensor]
    starts_afresh = True  # old moments know nothing of the new coordinates
    is_refitted = False

    def cpu(self) -> "Projection":
        """Return the same entry on the CPU."""
        return Projection(self.kept_states.cpu(), {path: tensor.cpu() for path, tensor in self.tensors.items()})


PlanEntry = Selection | Projection
Plan = dict[int, PlanEntry]  # by layer index


def plan_fingerprint(plan: Plan) -> str:
    """Return a text that is the same for equal plans only."""
    digest = hashlib.sha256()
    for index, entry in plan.items():
        for name, tensor in {"kept_states": entry.kept_states, **entry.tensors}.items():
            digest.update(f"{index} {name}".encode())
            digest.update(b"" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
