"""The tests' models are loaded, as those of users are; the long proofs try models just built and saved in bfloat16."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import MODEL_ORIGIN, ROOT, build_lru, build_model

ROOMS = ["architectures", "console", "sharing", "storage", "surgery", "training"]


@pytest.mark.parametrize("build", [build_model, build_lru])
def test_models_of_the_tests_are_what_users_load(build):
    model, random_number = build(seed=1), torch.rand(1)
    fresh = build.__wrapped__(seed=1)
    assert torch.equal(torch.rand(1), random_number)
    assert ("model_type" in vars(model.config)) == (MODEL_ORIGIN != "built")
    rounded = torch.bfloat16 if MODEL_ORIGIN == "bf16" else torch.float32
    for left, right in zip(model.parameters(), fresh.parameters(), strict=True):
        assert left.dtype == torch.float32 and torch.equal(left, right.to(rounded).float())


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["built", "bf16"])
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_for_models_of_another_origin(room, origin):
    environment = os.environ | {"MODEL_ORIGIN": origin}
    command = [sys.executable, "-m", "pytest", "-n", "0", f"tests/{room}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
