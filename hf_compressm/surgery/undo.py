"""Whatever exception ends a change of models and optimizers, even Ctrl+C, they are then what they were before it."""

from collections.abc import Callable, Iterable

from ..engines import Engine
from .optimizer_parts import OptimizerParts


class Undo:
    """Within a block of this kind, all changes are kept if the block ends well, and undone if an exception ends it.

    A resize replaces parameters and does not write into them. So what was before is known by references to it: the
    attributes of every module and config, the entries of every dict among these, the groups and the state of the
    optimizers, and what the engines hold. Nothing is copied but the dicts.

    Args:
        engines: the models that are changed, as they are held.
        parts: what their optimizers hold.
    """

    def __init__(self, engines: Iterable[Engine], parts: Iterable[OptimizerParts] = ()):
        self._restore: list[Callable[[], None]] = []
        for engine in engines:
            modules = list(engine.model.modules())
            configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
            self._restore += [_restorer(owner) for owner in (*modules, *configs.values())]
            self._restore.append(engine.restorer())
        for part in parts:
            self._restore += [_entries_restorer(held) for held in (*part.groups.values(), *part.tables.values())]

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind, error, traceback) -> None:
        """Undo the changes if an exception ends the block; it goes on its way."""
        if kind is not None:
            self.undo()

    def undo(self) -> None:
        """Make everything what it was when this object was made."""
        for restore in self._restore:
            restore()


def _restorer(owner: object) -> Callable[[], None]:
    """Return a function that gives an object the class and the attributes that it has now."""
    own_class, attributes = type(owner), vars(owner)
    restorers = [_entries_restorer(held) for held in (attributes, *attributes.values()) if isinstance(held, dict)]

    def restore() -> None:
        owner.__class__ = own_class
        for restore_entries in restorers:
            restore_entries()

    return restore


def _entries_restorer(held: dict) -> Callable[[], None]:
    """Return a function that gives a dict the entries that it has now."""
    entries = dict(held)

    def restore() -> None:
        held.clear()
        held.update(entries)

    return restore
