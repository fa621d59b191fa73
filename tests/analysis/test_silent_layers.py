"""Where no layer's output changes when it is probed, there is nothing to tell the layers apart."""

import pytest
import torch

from hf_compressm import CompreSSMConfig
from hf_compressm.analysis.allocation import choose_sizes, predicted_changes

N = 8
SCORES = {index: torch.linspace(1, 0.1, N, dtype=torch.float64) for index in range(2)}
ONE_STATE_CARRIES_ALL = {index: torch.tensor([2.0 - index] + [0.0] * N, dtype=torch.float64) for index in range(2)}


def loss_with_noise(sizes) -> float:
    """A cut that changes no output still moves a loss by round-off."""
    return 2.0 + 1e-9 * sum(N - sizes.get(index, N) for index in range(2))


def test_a_rise_of_the_loss_without_an_error_in_any_output_is_noise():
    config = CompreSSMConfig(target_state_size=1, allocation="global")
    changes = predicted_changes(config, ONE_STATE_CARRIES_ALL, loss_with_noise)
    assert {index: change.tolist() for index, change in changes.items()} == {
        index: error.tolist() for index, error in ONE_STATE_CARRIES_ALL.items()
    }


@pytest.mark.parametrize(
    ("goal", "total"),
    [
        ({"tolerance": 0.01}, 2),
        ({"target_state_size": 4}, 8),
        ({"cut_fraction": 0.25}, 12),
        ({"loss_budget": 0.1}, 2),
    ],
)
def test_every_goal_is_met_without_an_error_in_any_output(goal, total):
    config = CompreSSMConfig(allocation="global", **goal)
    assert sum(choose_sizes(config, SCORES, "global", loss_with_noise, ONE_STATE_CARRIES_ALL).values()) == total
