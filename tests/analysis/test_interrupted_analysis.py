"""An analysis changes nothing, whichever of its forward passes fails."""

import pytest
import torch
from conftest import assert_identical, build_model, random_state, weights_of

from hf_compressm import CompreSSMConfig, analyze

TINY = {"hidden_size": 8, "state_size": 4, "vocab_size": 16}
CONFIGS = {
    "refit": {"target_state_size": 2, "refit": True},
    "gradients": {"target_state_size": 2, "criterion": "taylor"},
    "recall": {"target_state_size": 2, "recall_pairs": 2},
    "global": {"cut_fraction": 0.5, "allocation": "global"},
}


class Interrupt(BaseException):
    """It is none of `Exception`, as KeyboardInterrupt is none."""


class FailingForward:
    """A hook in the middle of a model that raises in one of its forward passes.

    Args:
        at: the number of that pass, from 0; by default it raises in none.
    """

    def __init__(self, model, at: int = -1):
        self.at, self.passes = at, 0
        self.handle = model.backbone.layers[1].register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        self.passes += 1
        if self.passes == self.at + 1:
            raise Interrupt


def everything_of(model) -> tuple:
    modules = [
        (module.training, vars(module).keys(), {k: list(v) for k, v in vars(module).items() if k.endswith("_hooks")})
        for module in model.modules()
    ]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    return modules, model.config.to_dict(), random_state(), gradients, torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [pytest.param("refit", marks=pytest.mark.slow), "gradients", "recall", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_failure_in_any_forward_pass_leaves_everything_as_it_was(kind, dtype):
    ids = torch.randint(0, 16, (2, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids.roll(i), "labels": ids.roll(i)} for i in range(6)]
    config = CompreSSMConfig(calibration_batches=6, **CONFIGS[kind])
    model = build_model(**TINY).to(dtype).train()
    counter = FailingForward(model)
    analyze(model, batches, config)
    counter.handle.remove()
    parameters, weights = list(model.parameters()), weights_of(model)
    assert counter.passes > 6
    for number in range(counter.passes):
        failing = FailingForward(model, number)
        before = everything_of(model)
        with pytest.raises(Interrupt):
            analyze(model, batches, config)
        assert everything_of(model) == before
        failing.handle.remove()
        assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
        assert_identical(weights_of(model), weights)
        assert all(parameter.grad is None for parameter in parameters)
    assert str(analyze(model, batches, config).plan) == str(analyze(model, batches, config).plan)
