"""Runs that wait for rankings to stand still: the callback, and a run that tests of several rooms look at."""

import pytest
from conftest import build_model, build_trainer

from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMSchedule, install_scan

# Of 20 steps: compared with two steps before at 4, 6 … 16; cut after 4 at the earliest, after 17 at the latest.
SETTLED = {"trigger": "settled", "start": 0.1, "end": 0.85, "monitor_steps": 2, "settled_patience": 1}
TARGET = {"target_state_size": 4, "calibration_batches": 4}


def waiting_callback(config: dict | None = None, **changes) -> CompreSSMCallback:
    return CompreSSMCallback(CompreSSMConfig(**(TARGET | (config or {}))), CompreSSMSchedule(**(SETTLED | changes)))


def train_until_settled(folder, dataset, checkpoint=None, seed=0):
    callback = waiting_callback(
        {"allocation": "per_layer", "calibration_batches": 8}, monitor_steps=4, settled_over=0.2, end=0.9
    )
    trainer = build_trainer(
        folder, dataset, model=build_model(seed=seed), max_steps=60, save_strategy="steps", save_steps=4
    )
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, callback


@pytest.fixture(scope="session")
def settling_run(tmp_path_factory, dataset):
    """(trainer, callback) of a run whose layers settle one after the other; a checkpoint after every fourth step."""
    install_scan()
    return train_until_settled(tmp_path_factory.mktemp("settling"), dataset)
