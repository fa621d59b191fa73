"""These functions name the arms of a study of Mamba; its tables and figures know them by these names alone."""

ABLE = 0.9  # the accuracy from which on a model counts as able to do a task


def throughout(full: int) -> str:
    """Name the arm that is never cut."""
    return f"N = {full} throughout"


def from_scratch(size: int) -> str:
    """Name the arm that is as small from the start."""
    return f"N = {size} from scratch"


def cut_at(end: float, full: int, size: int) -> str:
    """Name the arm that is cut once, after this fraction of the steps."""
    return f"{full} → {size} at {round(100 * end)} %"


def refitted(arm: str) -> str:
    """Name the same arm with a refit."""
    return f"{arm}, refitted"


def as_long_as(arm: str, other: str) -> str:
    """Name an arm with as many steps as fit into the time of another."""
    return f"{arm}, as long as {other}"


def projected(size: int, full: int, rows: str) -> str:
    """Name the arm that has so few states from the start, projected from N features by such rows."""
    return f"{size} projected from {full} at the start, {rows}"


def started_as(size: int, full: int) -> str:
    """Name the arm that is as small from the start, with the learning rate and the scale of maps of the full size."""
    return f"{from_scratch(size)}, started as N = {full}"


def cut_when_able(full: int, size: int) -> str:
    """Name the arm that is cut when the full size of its seed has become able."""
    return f"{full} → {size} at {100 * ABLE:.0f} % accuracy"


def then_reduced(full: int) -> str:
    """Name the arm that is trained at the full size, and reduced in every way after its training."""
    return f"{throughout(full)}, then reduced"


def grown_to(arm: str, size: int) -> str:
    """Name an arm whose states are doubled whenever they are flat, up to this size."""
    return f"{arm}, grown to {size} when flat"


def difficulty_run(name: str, size: int) -> str:
    """Name a run that shows what a size can do in a task as hard as this."""
    return f"difficulty {name}, N = {size}"


def rate_run(rate: float, size: int, scale: float = 1) -> str:
    """Name a run that shows how well a learning rate, and an initial scale of the maps B and C, serve a size."""
    return f"rate {rate:g}, N = {size}" + (f", scale {scale:g}" if scale != 1 else "")
