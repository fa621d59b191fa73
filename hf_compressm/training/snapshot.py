"""Snapshots keep a model and its optimizer, in memory or on disk, and restore them at any other size.

Each process keeps its own part; none of them waits for another.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..architectures import state_sizes
from ..engines import process_count, process_index, raise_in_all_processes, to_local, unwrap
from ..storage.files import write_aside
from ..surgery.optimizer_parts import OptimizerParts, as_state, from_state
from ..surgery.shrink_and_grow import set_state_sizes


class Snapshot:
    """A snapshot keeps what training changes: weights, buffers, the optimizer's state of every parameter.

    The optimizer's groups are left out: learning rates, which are the scheduler's, but also what some optimizers
    (Prodigy, schedule-free ones) keep there.

    Args:
        model: the model as its engine has it, wrapped.
        optimizer: the optimizer that trains it, or None.
        folder: the folder to keep the snapshot in; by default it stays in memory, on the CPU.
        companions: models that follow the model, such as a running average of its weights.
        mark: a text that tells the snapshot from those of other runs in the same folder.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer=None,
        folder: Path | None = None,
        companions: Sequence[nn.Module] = (),
        mark: str = "",
    ):
        bare = unwrap(model)
        self.folder = folder
        self._content = {
            "state_sizes": state_sizes(bare),
            "tensors": _tensors_of(bare),
            "optimizer": {name: _kept_states(bare, table) for name, table in OptimizerParts(optimizer).tables.items()},
            "companions": [_tensors_of(companion) for companion in companions],
            "mark": mark,
        }
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_aside(folder / _file_name(), lambda path: torch.save(self._content, path))
            self._content = None

    @classmethod
    def found(cls, folder: Path, mark: str = "") -> "Snapshot | None":
        """Return the snapshot that this process of an earlier run left; None if none there has this mark."""
        file = folder / _file_name()
        if not file.is_file() or _read(file)["mark"] != mark:
            return None
        snapshot = cls.__new__(cls)
        snapshot.folder, snapshot._content = folder, None
        return snapshot

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer=None, companions: Sequence[nn.Module] = ()) -> None:
        """Make model, optimizer and companions what they were, at the size they had.

        Raises:
            ValueError: the file is damaged, or the surgery is refused. Nothing has been changed then.
        """
        with raise_in_all_processes():
            content = self._content if self._content is not None else _read(self.folder / _file_name())
            if len(companions) != len(content["companions"]):
                raise ValueError(
                    f"the snapshot holds {len(content['companions'])} companions; given are {len(companions)}."
                )
        set_state_sizes(model, content["state_sizes"], optimizer, companions)
        bare = unwrap(model)
        _fill(bare, content["tensors"])
        for table_name, table in OptimizerParts(optimizer).tables.items():
            states = content["optimizer"].get(table_name, {})
            for name, parameter in bare.named_parameters():
                _set_state(table, parameter, states.get(name))
        for companion, tensors in zip(companions, content["companions"], strict=True):
            _fill(companion, tensors)

    def discard(self) -> None:
        """Free the memory or the files that the snapshot holds."""
        self._content = None
        if self.folder is not None:
            for file in self.folder.glob(f"*{_file_name()}*"):  # this includes what a killed process was writing
                file.unlink(missing_ok=True)
            with suppress(OSError):  # another process still has a file there, or removed the folder itself
                self.folder.rmdir()


def _file_name() -> str:
    return f"process-{process_index()}-of-{process_count()}.pt"


def _read(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"the snapshot {path} is damaged ({error}). Delete it to go on without.") from error


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: _kept(tensor) for name, tensor in tensors.items()}


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        to_local(tensor.detach()).copy_(tensors[name])
        tensor.grad = None


def _kept_states(model: nn.Module, table: dict) -> dict[str, dict]:
    """Return parameter name → key → (value, whether it lies on the CPU, as its parameter may not)."""
    return {
        name: {
            key: (_kept(value), value.device.type == "cpu") if isinstance(value, Tensor) else (value, True)
            for key, value in as_state(table[parameter]).items()
        }
        for name, parameter in model.named_parameters()
        if parameter in table
    }


def _set_state(table: dict, parameter: nn.Parameter, state: dict | None) -> None:
    table.pop(parameter, None)
    if state:
        table[parameter] = from_state(
            {
                key: _placed(value, on_cpu, parameter) if isinstance(value, Tensor) else value
                for key, (value, on_cpu) in state.items()
            }
        )


def _placed(value: Tensor, on_cpu: bool, parameter: nn.Parameter) -> Tensor:
    placed = value.clone() if on_cpu else value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.ndim and value.shape == parameter.to_local().shape:
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(
            placed, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    return placed


def _kept(tensor: Tensor) -> Tensor:
    return to_local(tensor.detach()).to("cpu", copy=True)
