"""Two processes train and cut a FalconMamba, a Jamba and a Zamba as one would on their joined batch."""

import pytest
import torch
from compared_runs import PROCESSES, launching, running_alone
from conftest import ROOT, assert_identical
from distributed_mamba1_kin import DEFAULTS, ENGINES, build

from hf_compressm.surgery.adopt_sizes import adopt_checkpoint_sizes

IN_CI = ("falcon_mamba refitted", "jamba", "zamba")
VARIANTS = [
    pytest.param(engine, name, marks=() if name in IN_CI else pytest.mark.slow)
    for engine in ENGINES
    for name in ENGINES[engine]
]
SCRIPT = ROOT / "tests" / "engines" / "distributed_mamba1_kin.py"
launched = launching(SCRIPT, ENGINES, lambda engine, name: name not in IN_CI)
alone = running_alone(DEFAULTS)


@torch.no_grad()
def logits_of(kind: str, weights: dict) -> torch.Tensor:
    """What the model with these weights computes."""
    model = build(kind)
    adopt_checkpoint_sizes(model)
    model.load_state_dict(weights)
    return model.eval()(input_ids=torch.arange(24).view(1, 24)).logits


def size_of(weights: dict) -> int:
    return next(tensor.shape[-1] for name, tensor in weights.items() if name.endswith("A_log"))


@pytest.mark.parametrize(("engine", "variant"), VARIANTS)
def test_weights_are_those_of_one_process_after_every_step(launched, alone, engine, variant):
    expected, folder = alone(ENGINES[engine][variant]), launched(engine, variant not in IN_CI)
    first, second = (torch.load(folder / f"{engine} {variant} {rank}.pt") for rank in range(PROCESSES))
    compared = 2 if "refitted" in variant else 13  # a fit may end elsewhere in a flat valley
    sizes = [16] * 2 + ([4] * 3 + [1] * 8 if variant == "zamba refitted" else [8] * 3 + [4] * 8)
    assert [size_of(weights) for weights in first] == sizes
    for step, (weights, same, reference) in enumerate(zip(first, second, expected, strict=True)):
        assert_identical(weights, same)
        far = max((weights[name] - reference[name]).abs().max() for name in reference)
        assert step >= compared or far < 1e-6
    left, right = (logits_of(variant.split()[0], each[-1]) for each in (first, expected))
    assert (left - right).abs().max() < 1e-4
