"""Every field of the configuration is an option of the console, and arrives."""

import argparse
from dataclasses import fields
from typing import get_type_hints

import pytest

from hf_compressm import CompreSSMConfig
from hf_compressm.config import CHOICES, GOALS
from hf_compressm.console.cli import main
from hf_compressm.console.options import DEFAULT_GOAL, DEFAULTS, add_config_options, config_from

FIELDS = {field.name: field for field in fields(CompreSSMConfig)}
TYPES = get_type_hints(CompreSSMConfig)


def config_of(*words: str) -> CompreSSMConfig:
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return config_from(parser.parse_args(words))


def words_and_value(name: str) -> tuple[list[str], object]:
    """Words of a command line that give a field another value than its default, and that value."""
    flag, kind = f"--{name.replace('_', '-')}", TYPES[name]
    if kind is bool:
        value = not FIELDS[name].default
        return [flag if value else flag.replace("--", "--no-", 1)], value
    if name in CHOICES:
        value = next(choice for choice in reversed(CHOICES[name]) if choice != FIELDS[name].default)
        return [flag, value], value
    if kind == list[int]:
        return [flag, "3", "5"], [3, 5]
    value = 0.25 if (name in GOALS and "size" not in name) or name.startswith("min_reduction") else 7
    return [flag, str(value)], value


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_an_option_that_arrives(name):
    words, value = words_and_value(name)
    default = vars(config_of())[name]
    assert value != default
    config = config_of(*words)
    assert vars(config)[name] == value and type(vars(config)[name]) is type(value)
    others = {other for other in FIELDS if vars(config)[other] != vars(config_of())[other]}
    assert others == {name} | (set(DEFAULT_GOAL) if name in GOALS else set())


@pytest.mark.parametrize("name", [name for name in FIELDS if TYPES[name] is bool])
def test_a_switch_can_be_set_either_way(name):
    flag = name.replace("_", "-")
    assert vars(config_of(f"--{flag}"))[name] is True and vars(config_of(f"--no-{flag}"))[name] is False


def test_without_options_it_is_the_configuration_of_the_console():
    assert config_of() == CompreSSMConfig(**DEFAULT_GOAL, **DEFAULTS)
    assert config_of("--cut-fraction", "0.5") == CompreSSMConfig(cut_fraction=0.5, **DEFAULTS)
    assert config_of("--calibration-batches", "4") == CompreSSMConfig(**DEFAULT_GOAL)


@pytest.mark.parametrize("command", ["analyze", "compress"])
def test_the_help_has_the_text_of_every_field(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')}" in printed and " ".join(field.metadata["help"].split()) in printed
    assert "(default: 8)" in printed and "one of these; by default --tolerance 0.01" in printed
    assert "--allocation {uniform,per_layer,global}" in printed and "--no-compensate" in printed
