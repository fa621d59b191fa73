"""A model at its first size, with an optimizer already, takes up a reduced checkpoint of Accelerate's."""

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model, train_steps

from hf_compressm import CompreSSMConfig, analyze, compress
from hf_compressm.architectures import state_sizes
from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes


def prepared():
    accelerator, model = Accelerator(cpu=True), build_model()
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))


@pytest.mark.parametrize("allocation", ["uniform", "per_layer"])
def test_the_optimizer_trains_what_was_loaded(tmp_path, batches, allocation):
    accelerator, model, optimizer = prepared()
    train_steps(model, optimizer, batches[:3])
    compress(model, analyze(model, batches, CompreSSMConfig(tolerance=0.2, allocation=allocation)), optimizer)
    train_steps(model, optimizer, batches[3:5])
    accelerator.save_state(tmp_path)
    expected = train_steps(model, optimizer, batches[5:])

    accelerator, resumed, optimizer = prepared()
    adopt_checkpoint_sizes(resumed, optimizer)
    accelerator.load_state(tmp_path)
    assert state_sizes(resumed) == state_sizes(model) != {0: 16, 1: 16}
    assert train_steps(resumed, optimizer, batches[5:]) == expected
