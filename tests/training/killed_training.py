"""A run that cuts and saves, to be killed: `python killed_training.py FOLDER [FUNCTION:CALL | --full-after STEP]`.

The folder around FOLDER is named after what is trained: a Mamba, or a Mamba-2 that is cut in one of its bases.
With FUNCTION:CALL it kills itself at that call of a function of that name; with --full-after no file can grow large
after that step. Otherwise it says when it starts and waits for whatever comes. If FOLDER holds a whole checkpoint, it
goes on from there.
"""

import os
import resource
import signal
import sys
from pathlib import Path

from conftest import build_model, build_trainer, weights_of
from datasets import load_from_disk
from safetensors.torch import save_file
from scalar_decay_models import build_mamba2
from trainer_callbacks import cutting_callback
from transformers import TrainerCallback

from hf_compressm import install_scan
from hf_compressm.storage.checkpoint import last_complete_checkpoint

RUNS = {  # name → what builds the model, and what else its configuration says
    "mamba": (build_model, {}),
    "mamba2-axis": (build_mamba2, {"basis": "axis"}),
    "mamba2-balanced": (build_mamba2, {"basis": "balanced"}),
}


def kill_at(function: str, call: int) -> None:
    """SIGKILL to this process when it enters `function` for the `call`-th time."""
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        if event == "call" and frame.f_code.co_name == function:
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


class DiskFull(TrainerCallback):
    """After a step no file may become larger than some bytes, as on a disk that is full."""

    def __init__(self, step: int, size: int = 20_000):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def main() -> None:
    folder = Path(sys.argv[1])
    install_scan()
    build, config = RUNS[folder.parent.name]
    callback = cutting_callback(**config)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    trainer = build_trainer(folder, load_from_disk(folder.parent / "dataset"), model=build(), **options)
    callback.attach(trainer)
    if "--full-after" in sys.argv:
        trainer.add_callback(DiskFull(int(sys.argv[-1])))
    elif len(sys.argv) > 2:
        function, _, call = sys.argv[2].partition(":")
        kill_at(function, int(call))
    print("starting", flush=True)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    print("trained", flush=True)
    save_file(weights_of(trainer.model), folder / "weights.safetensors")


if __name__ == "__main__":
    main()
