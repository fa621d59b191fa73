"""A change of sizes is interrupted at one line after the other: how, and what has to hold afterwards.

The exception is raised by a tracer at every line that runs, one after the other, as Ctrl+C may raise one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import assert_identical, weights_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_compressm
from hf_compressm import compress
from hf_compressm.architectures import state_layers
from hf_compressm.engines import full_tensor

PACKAGE = Path(hf_compressm.__file__).parent
TRACED = tuple(str(PACKAGE / room) for room in ("surgery", "architectures", "engines", "reduction.py"))
SIZES = {"hidden_size": 8, "state_size": 4, "vocab_size": 16}
IDS = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


class Interrupt(BaseException):
    """It is none of `Exception`, as KeyboardInterrupt is none."""


class Interrupter:
    """A tracer that notes every line that runs, and raises at one of them.

    Args:
        at: the number of the line to raise at, counted from 0 as they run; by default it raises at none.
    """

    def __init__(self, at: int = -1):
        self.at, self.lines = at, []

    def __enter__(self):
        sys.settrace(lambda frame, event, argument: self if frame.f_code.co_filename.startswith(TRACED) else None)
        return self

    def __exit__(self, *ignored):
        sys.settrace(None)

    def __call__(self, frame, event, argument):
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            if len(self.lines) == self.at + 1:
                raise Interrupt
        return self


def first_and_last(lines: list) -> list[int]:
    """Where each line runs for the first time and for the last; what lies between is the same for other tensors."""
    first = {line: len(lines) - 1 - number for number, line in enumerate(reversed(lines))}
    last = {line: number for number, line in enumerate(lines)}
    return sorted({*first.values(), *last.values()})


def while_things_change(lines: list) -> list[int]:
    """Where each line runs for the first time after things begin to change."""
    begin = max(number for number, (_, _, function) in enumerate(lines) if function == "__enter__") + 1
    first = {line: number for number, line in reversed(list(enumerate(lines[begin:], begin)))}
    return sorted({*first.values(), len(lines) - 1})


def some_while_things_change(lines: list) -> list[int]:
    """A few of these."""
    chosen = while_things_change(lines)
    return [*chosen[::5], chosen[-1]]


def some(lines: list) -> list[int]:
    """A few of them, from the first to the last."""
    chosen = first_and_last(lines)
    return [*chosen[::40], chosen[-1]]


def everything_of(run) -> dict:
    """All that a change touches, in a form that can be compared: tensors as themselves, and all else by its value."""
    found = {}
    for name, module in run.model.named_modules():
        found[name, "class"], found[name, "names"] = type(module), list(vars(module))
        found |= {(name, key): value for key, value in vars(module).items() if isinstance(value, int | type(None))}
        found |= {(name, "parameter", key): value for key, value in module._parameters.items()}
        found[name, "config"] = getattr(module, "config", None)
    found["config"] = type(run.model.config), run.model.config.to_dict()
    for number, group in enumerate(run.optimizer.param_groups):
        found |= {("group", number, position): one for position, one in enumerate(group["params"])}
    for parameter, state in run.optimizer.state.items():
        found |= {("state", id(parameter), key): value for key, value in state.items()}
    found["applied"] = run.report.applied if run.report else None
    return found


def same(left, right) -> bool:
    return left is right if isinstance(left, torch.Tensor) else left == right


def build(make: Callable, batch: dict = BATCH, wrap=lambda model: model) -> SimpleNamespace:
    """A model in training, with moments, and with gradients that wait for their step."""
    model = make()
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        wrapped(**batch).loss.backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return SimpleNamespace(model=model, wrapped=wrapped, optimizer=optimizer, report=None, companions=())


def assert_all_or_nothing(start: Callable, change: Callable, choose: Callable, check: Callable = lambda run: None):
    """Interrupt a change at every chosen line; afterwards nothing is changed, or all is.

    Args:
        start: builds what is changed, always the same.
        change: changes it.
        choose: which of the lines to interrupt.
        check: what has to hold afterwards in any case; it may train.
    """
    reference = start()
    with Interrupter() as tracer:
        change(reference)
    finished, sizes = whole_weights_of(reference.model), state_layers(reference.model).sizes
    run, undone, done = start(), 0, 0
    assert state_layers(run.model).sizes != sizes
    for number in choose(tracer.lines):
        before = everything_of(run)
        values = {name: tensor.clone() for name, tensor in before.items() if isinstance(tensor, torch.Tensor)}
        with pytest.raises(Interrupt), Interrupter(number) as interrupter:
            change(run)
        where, now = interrupter.lines[-1], everything_of(run)
        if state_layers(run.model).sizes == sizes:
            done += 1
            assert_identical(whole_weights_of(run.model), finished)
            assert run.model.config.to_dict() == reference.model.config.to_dict(), where
            assert {type(m) for m in run.model.modules()} == {type(m) for m in reference.model.modules()}, where
            held = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
            assert {*held} == {*run.optimizer.state, *held} <= {*run.model.parameters()}, where
            assert run.report is None or run.report.applied, where
        else:
            undone += 1
            assert now.keys() == before.keys(), where
            assert not [name for name in before if not same(now[name], before[name])], where
            assert all(torch.equal(full_tensor(now[name]), full_tensor(values[name])) for name in values), where
        if state_layers(run.model).sizes == sizes or undone % 20 == 0:
            check(run)
            run = start()
    assert undone and done, (undone, done)


def whole_weights_of(model) -> dict:
    return {name: full_tensor(tensor) for name, tensor in weights_of(model).items()}


def cut(run):
    compress(run.wrapped, run.report, run.optimizer, companions=run.companions)


def thorough(*values):
    """The parameter `choose` with these values, and in the slow tests with all lines."""
    return pytest.mark.parametrize("choose", [*values, pytest.param(first_and_last, marks=pytest.mark.slow)])


@contextmanager
def one_process() -> Iterator[None]:
    """A group of one process, so that engines of several can hold a model here."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def counted(model) -> DistributedDataParallel:
    """The model in a wrapper that counts the entries of all gradients that it synchronises."""
    wrapper = DistributedDataParallel(model)
    wrapper.entries = []

    def count(entries: list, bucket):
        entries.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapper.register_comm_hook(wrapper.entries, count)
    return wrapper


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_cut_with_a_companion(make: Callable, report, choose: Callable) -> None:
    """A cut of a model that `make` builds, and of another one that follows it, such as an average of its weights."""

    def start():
        run = build(make)
        run.report, run.companions = replace(report), (make(),)
        return run

    def check(run):
        assert state_layers(run.companions[0]).sizes == state_layers(run.model).sizes
        assert type(run.companions[0]) is type(run.model)
        run.optimizer.step()
        assert torch.isfinite(run.model(**BATCH).loss)

    assert_all_or_nothing(start, cut, choose, check)


def assert_cut_under_an_engine(make: Callable, report, wrap: Callable, choose: Callable) -> None:
    """A cut of a model that `make` builds, in a wrapper; afterwards the wrapper trains what there is to train."""

    def start():
        run = build(make, wrap=wrap)
        run.report = replace(report)
        return run

    def check(run):
        run.optimizer.zero_grad()
        if wrap is counted:
            run.wrapped.entries.clear()
        run.wrapped(**BATCH).loss.backward()
        unused = set(getattr(run.model, "_ddp_params_and_buffers_to_ignore", ()))
        used = [parameter for name, parameter in run.model.named_parameters() if name not in unused]
        assert all(parameter.grad.shape == parameter.shape for parameter in used)
        if wrap is counted:
            assert sum(run.wrapped.entries) == sum(parameter.numel() for parameter in used)
        run.optimizer.step()

    with one_process():
        assert_all_or_nothing(start, cut, choose, check)
