"""Runs in two processes, launched together, and the same runs in one process, to compare with."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from distributed_training import train
from processes import run_in_processes

PROCESSES = 2


def launching(script: Path, engines: Mapping[str, Mapping], is_slow: Callable[[str, str], bool]):
    """A fixture: (engine, whether those that are slow) → the folder where its variants have run, all in one launch."""

    @pytest.fixture(scope="module")
    def launched(tmp_path_factory, dataset):
        folders = {}

        def run(engine: str, slow: bool = False) -> Path:
            if (engine, slow) not in folders:
                folder = folders[engine, slow] = tmp_path_factory.mktemp(engine)
                dataset.save_to_disk(folder / "dataset")
                names = [name for name in engines[engine] if is_slow(engine, name) == slow]
                run_in_processes(PROCESSES, script, folder, engine, *names)
            return folders[engine, slow]

        return run

    return launched


def running_alone(defaults: Mapping = {}, without: tuple[str, ...] = ("ddp_", "fsdp")):
    """A fixture: options → the weights after each step of one process.

    Args:
        defaults: options of all runs.
        without: how options begin that make no difference to one process.
    """

    @pytest.fixture(scope="module")
    def alone(tmp_path_factory, dataset):
        runs = {}

        def run(options: dict) -> list[dict]:
            options = {name: value for name, value in options.items() if not name.startswith(without)}
            if str(options) not in runs:
                runs[str(options)] = train(tmp_path_factory.mktemp("alone"), dataset, **defaults | options)[1]
            return runs[str(options)]

        return run

    return alone
