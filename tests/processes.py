"""Programs in processes of their own, without what such a process costs most: 7 s of a CPU for its imports.

A server imports torch and Transformers once, and nothing of ours; each program runs in a fork of it. Where the launch
itself is to be proved, or what is read from the environment while importing, a test starts a whole interpreter.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest

FOREIGN = """
    torch torch.distributed.fsdp torch.distributed.checkpoint transformers.trainer accelerate datasets tokenizers
    transformers.models.mamba.modeling_mamba pytest
""".split()


@cache
def fork_server() -> BaseContext:
    """The server, started by the first program. It uses no network, and no cache of the user."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(FOREIGN)
    forks.datasets = TemporaryDirectory()  # it goes when the tests end
    with pytest.MonkeyPatch.context() as patch:  # what is imported reads its settings once
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", forks.datasets.name)
        first = forks.Process(target=int)
        first.start()
        first.join()
    return forks


class Program:
    """A program that runs, as `python PROGRAM ARGUMENTS` would: a script by its path, or the code itself."""

    def __init__(self, program: Path | str, *arguments, **environment: str):
        self.folder = TemporaryDirectory()
        given = program, [str(argument) for argument in arguments], os.environ | environment, Path(self.folder.name)
        self.process = fork_server().Process(target=_become, args=given)
        self.process.start()

    def wait(self) -> CompletedProcess:
        """Its exit code, which is minus the signal that killed it, and what it wrote."""
        self.process.join()
        with self.folder as folder:
            outputs = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        return CompletedProcess(self.process.name, self.process.exitcode, *outputs)


def run_program(program: Path | str, *arguments, check: bool = True, **environment: str) -> CompletedProcess:
    """Run a program to its end, in the way of `subprocess.run`; with `check` it has to succeed."""
    return _checked(Program(program, *arguments, **environment).wait(), check)


def run_in_processes(
    count: int, program: Path | str, *arguments, check: bool = True, **environment: str
) -> CompletedProcess:
    """Run a program in processes that find each other, in the way of `torchrun`; if one fails, all are stopped.

    Returns:
        That which failed first, or that of rank 0.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ranks = [
        Program(program, *arguments, **environment, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)
    ]
    running, failed = list(ranks), []
    while running and not failed:
        multiprocessing.connection.wait([rank.process.sentinel for rank in running])
        failed = [rank for rank in running if rank.process.exitcode]
        running = [rank for rank in running if rank.process.is_alive()]
    for rank in running:
        rank.process.kill()
    done = {rank: rank.wait() for rank in ranks}
    return _checked(done[(failed or ranks)[0]], check)


def _checked(done: CompletedProcess, check: bool) -> CompletedProcess:
    assert not check or done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    return done


def _become(program: Path | str, arguments: list[str], environment: Mapping[str, str], folder: Path) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream)
    faulthandler.enable(2)  # a crash says where
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))
