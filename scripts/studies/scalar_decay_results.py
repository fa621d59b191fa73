"""This module makes the tables and figures of the studies of Mamba-2, from the JSONs of their runs alone."""

from pathlib import Path

ABLE = 0.9  # the accuracy from which on a model counts as able to do the task


def first_able(probes: list[dict], size: int | None = None) -> int | None:
    """Return the first step at which a model of this size, of any for None, was right in 90 % of the cases."""
    return next((p["step"] for p in probes if p["accuracy"] >= ABLE and size in (None, p["state_size"])), None)


def report(root: Path, results: list[dict]) -> None:
    """Print the tables, and put them and the figures beside the runs."""
