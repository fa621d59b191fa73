"""The console's options that make a `CompreSSMConfig` are generated here, one from each of its fields."""

import argparse
from dataclasses import MISSING, Field, fields
from typing import get_args, get_origin, get_type_hints

from ..config import CHOICES, GOALS, CompreSSMConfig

# The console differs from the dataclass in these: it has a goal by default, and a command may take its time.
DEFAULT_GOAL = {"tolerance": 0.01}
DEFAULTS = {"calibration_batches": 8}

WORDS = (int, float, str)  # a word of the command line can be read as these
_TYPES = get_type_hints(CompreSSMConfig)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of `CompreSSMConfig`, in three groups.

    An option that is not given leaves nothing in the namespace; `config_from` fills in the defaults.
    """
    goal = " ".join(f"{_flag(name)} {value}" for name, value in DEFAULT_GOAL.items())
    groups = {
        "goal": parser.add_argument_group("what to keep", f"one of these; by default {goal}"),
        "how": parser.add_argument_group("how to reduce"),
        "calibration": parser.add_argument_group("calibration"),
    }
    for field in fields(CompreSSMConfig):
        kind = "goal" if field.name in GOALS else field.name.partition("_")[0]
        _add_option(groups.get(kind, groups["how"]), field)


def config_from(options: argparse.Namespace) -> CompreSSMConfig:
    """Return the configuration that was asked for.

    Raises:
        ValueError: a value is out of range, or values cannot hold together.
    """
    names = [field.name for field in fields(CompreSSMConfig)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    goal = {} if given.keys() & set(GOALS) else DEFAULT_GOAL
    return CompreSSMConfig(**(DEFAULTS | goal | given))


def _add_option(group, field: Field) -> None:
    kind = _TYPES[field.name]
    how = {"help": _help(field), "default": argparse.SUPPRESS}
    if kind is bool:
        group.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, **how)
        return
    how["type"] = next(word for word in WORDS if word in (kind, *get_args(kind)))
    if get_origin(kind) is list:
        how["nargs"] = "+"
    if field.name in CHOICES:  # shown; the configuration itself refuses what is none of them
        how["metavar"] = "{" + ",".join(CHOICES[field.name]) + "}"
    group.add_argument(_flag(field.name), **how)


def _help(field: Field) -> str:
    """Return the field's own text, with the default where there is one to tell."""
    default = DEFAULTS.get(field.name, field.default)
    shown = "" if default is None or default is MISSING else f" (default: {default})"
    return (field.metadata["help"] + shown).replace("%", "%%")  # argparse formats its help texts


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
