"""Fields of configurations: their help texts, and how they are checked."""

from dataclasses import field


def option(default, text: str):
    """A field with this default and help text, which HfArgumentParser shows."""
    return field(default=default, metadata={"help": text})


def require(condition: bool, name: str, given, allowed: str) -> None:
    """Refuse a value: what was given, and what is allowed."""
    if not condition:
        raise ValueError(f"{name} = {given!r}; allowed: {allowed}.")


def is_count(value) -> bool:
    """Whether it is a whole number, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
