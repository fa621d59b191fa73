"""Runs of `test_mamba1_kin_distributed.py`: `torchrun … distributed_mamba1_kin.py FOLDER ENGINE VARIANT…`.

Each variant of the engine trains a model of Mamba-1's kin and leaves, for every rank, the weights after each step.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import with_states_that_count
from datasets import load_from_disk
from distributed_training import WRAPPED, check_engine, train
from mamba1_models import BUILDERS

from hf_compressm import install_scan
from hf_compressm.architectures import state_layers

# Sums in another order differ in the last bit, which Adam makes much larger where a gradient is small.
DEFAULTS = {"learning_rate": 1e-3, "adam_epsilon": 3e-5, "attached": True}
FOUR = {"target_state_size": 4}
# From these starts L-BFGS reaches the same maps where sums are taken in another order; from others, it need not.
REFITTED = {
    "falcon_mamba": FOUR | {"refit": True},
    "jamba": FOUR | {"refit": True, "compensate": False},
    "zamba": {"target_state_size": 1, "refit": True, "compensate": False},
}
# Layers of a Zamba share the weights of attention, which no two units of FSDP2 can hold.
UNITS = {"zamba": WRAPPED | {"transformer_layer_cls_to_wrap": ["ZambaMambaDecoderLayer"]}}


@torch.no_grad()
def build(kind: str):
    """A model whose states count for something; in a Zamba, where no norm follows x_proj, that takes more."""
    model = with_states_that_count(BUILDERS[kind]())
    if kind == "zamba":
        for mixer in state_layers(model).values():
            mixer.x_proj_weight *= 32
            mixer.out_proj.weight *= 32
            mixer.D *= 0.01
    return model


DDP, FSDP = {}, {}
for kind in BUILDERS:
    for name, goal in ((kind, FOUR), (f"{kind} refitted", REFITTED[kind])):
        options = {"build": partial(build, kind), "goal": goal}
        DDP[name] = options | {"ddp_find_unused_parameters": False}
        FSDP[name] = options | {"fsdp_config": UNITS.get(kind, WRAPPED)}
ENGINES = {"ddp": DDP, "fsdp": FSDP}


def main() -> None:
    folder, engine, *names = Path(sys.argv[1]), *sys.argv[2:]
    install_scan()
    dataset = load_from_disk(folder / "dataset")
    for name in names:
        options = DEFAULTS | ENGINES[engine][name]
        trainer, weights = train(folder / engine / name, dataset, **options)
        check_engine(engine, trainer, is_compiled=False)
        cuts = trainer.state_size_callback.history.standing_cuts
        assert any(cut.refit for cut in cuts) == ("refitted" in name)
        torch.save(weights, folder / f"{engine} {name} {dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
