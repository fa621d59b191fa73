"""Surgery on an LRU: resized tensors take their places, their moments start anew, and nothing else is touched."""

import copy

import pytest
import torch
from conftest import assert_identical, train_steps, weights_of
from transformers import Adafactor

from hf_compressm import CompreSSMConfig, analyze, compress, parameter_groups
from hf_compressm.architectures import state_layers, state_sizes
from hf_compressm.surgery.shrink_and_grow import grow_state, pad_state

N = 16
RESIZED = ("nu_log", "theta_log", "gamma_log", "B", "C")


@pytest.mark.parametrize("goal", [{"skip_layers": [0]}, {"skip_layers": [1]}, {"min_reduction": 0.35}])
def test_a_layer_that_is_not_cut_stays_bit_identical(lru, goal):
    before = weights_of(lru)
    compress(lru, analyze(lru, None, CompreSSMConfig(**{"tolerance": 0.05} | goal)))
    sizes = state_sizes(lru)
    assert sorted(sizes.values())[0] < N == sorted(sizes.values())[1]
    untouched = [f"model.layers.{index}." for index in sizes if sizes[index] == N]
    after = weights_of(lru)
    same = {name for name in before if before[name].shape == after[name].shape and before[name].equal(after[name])}
    cut = {f"model.layers.{index}.mixer.{name}" for index in sizes if sizes[index] < N for name in RESIZED}
    assert len(untouched) == 1 and same == before.keys() - cut


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.AdamW,
        torch.optim.SGD,
        torch.optim.Adafactor,
        Adafactor,
    ],
)
def test_the_optimizer_follows_a_cut(lru, lru_batches, kind):
    """Resized tensors keep their positions and start afresh, all others keep their moments, and all go on learning."""
    options = {torch.optim.SGD: {"momentum": 0.9}, Adafactor: {"relative_step": False, "scale_parameter": False}}
    parameters = list(lru.parameters())
    groups = [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=1e-2, **options.get(kind, {}))
    train_steps(lru, optimizer, lru_batches[:2])

    def names_by_position() -> list[list[str]]:
        names = {parameter: name for name, parameter in lru.named_parameters()}
        return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    def states() -> dict[str, dict]:
        return {name: copy.deepcopy(dict(optimizer.state[p])) for name, p in lru.named_parameters()}

    positions, before = names_by_position(), states()
    resized = {f"model.layers.1.mixer.{name}" for name in RESIZED}
    compress(lru, analyze(lru, None, CompreSSMConfig(tolerance=0.05, skip_layers=[0])), optimizer)
    assert names_by_position() == positions
    torch.testing.assert_close(states(), {n: {} if n in resized else s for n, s in before.items()}, rtol=0, atol=0)

    weights = weights_of(lru)
    train_steps(lru, optimizer, [lru_batches[2]])
    assert not [name for name, parameter in lru.named_parameters() if torch.equal(parameter, weights[name])]
    for name, state in states().items():
        assert "step" not in state or int(state["step"]) == (1 if name in resized else 3)


def test_a_waiting_gradient_stays_with_its_weight_and_goes_with_a_resized_one(lru, lru_batches):
    lru(**lru_batches[0]).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in lru.named_parameters()}
    compress(lru, analyze(lru, None, CompreSSMConfig(target_state_size=6, skip_layers=[0])))
    for name, parameter in lru.named_parameters():
        if name in {f"model.layers.1.mixer.{resized}" for resized in RESIZED}:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, gradients[name])


def test_a_plan_that_fails_in_the_last_layer_changes_nothing(lru):
    report = analyze(lru, None, CompreSSMConfig(target_state_size=5))
    report.plan[1].tensors["B"][0, 0, 0] = float("inf")
    before, parameters = weights_of(lru), list(lru.parameters())
    with pytest.raises(ValueError, match="layer 1: the resized B would hold NaN or Inf; nothing was changed"):
        compress(lru, report)
    assert_identical(weights_of(lru), before)
    assert all(left is right for left, right in zip(lru.parameters(), parameters, strict=True))
    assert lru.config.state_size == N and not report.applied


def test_states_that_are_grown_are_for_selective_models_only_but_any_model_can_be_padded(lru, lru_batches):
    with pytest.raises(ValueError, match="states of a Linear Recurrent Unit cannot grow; use pad_state"):
        grow_state(lru, 2 * N)
    before = lru(**lru_batches[0]).logits
    pad_state(lru, N + 3)
    assert set(state_sizes(lru).values()) == {N + 3} and lru.config.state_sizes == [N + 3] * 2
    torch.testing.assert_close(lru(**lru_batches[0]).logits, before, rtol=0, atol=1e-6)


def test_the_recurrences_are_not_decayed(lru):
    decayed, others = (set(group["params"]) for group in parameter_groups(lru, 0.1))
    recurrences = {p for mixer in state_layers(lru).values() for p in mixer.parameters()}
    assert recurrences <= others and lru.classifier.weight in decayed
