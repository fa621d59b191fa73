"""A configuration is checked when it is built: the error names the value and what is allowed."""

import re

import pytest

from hf_compressm import CompreSSMConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of tolerance, target_state_size, loss_budget, cut_fraction; got none"),
        ({"tolerance": 0.1, "loss_budget": 0.1}, "got tolerance, loss_budget"),
        ({"tolerance": 0.0}, "tolerance = 0.0; allowed: a share in (0, 1)"),
        ({"tolerance": 1.0}, "tolerance = 1.0"),
        ({"tolerance": float("nan")}, "tolerance = nan"),
        ({"cut_fraction": 1.5}, "cut_fraction = 1.5"),
        ({"loss_budget": 0.0}, "loss_budget = 0.0"),
        ({"loss_budget": float("inf")}, "loss_budget = inf"),
        ({"target_state_size": 0}, "target_state_size = 0; allowed: a whole number, at least 1"),
        ({"target_state_size": 4.0}, "target_state_size = 4.0"),
        ({"target_state_size": 4, "min_state_size": 8}, "target_state_size = 4; allowed: ≥ min_state_size = 8"),
        ({"target_state_size": 12, "multiple_of": 8}, "target_state_size = 12; allowed: a multiple of 8"),
        ({"tolerance": 0.1, "criterion": "best"}, "criterion = 'best'; allowed: one of output, second_moment"),
        ({"tolerance": 0.1, "allocation": "best"}, "allocation = 'best'; allowed: one of uniform, per_layer"),
        ({"tolerance": 0.1, "selection": "best"}, "selection = 'best'; allowed: one of largest, smallest, random"),
        ({"tolerance": 0.1, "skip_layers": [0], "allocation": "uniform"}, "skip_layers = [0]; allowed: empty"),
        ({"tolerance": 0.1, "calibration_batches": 1}, "calibration_batches = 1; allowed: a whole number, at least 2"),
        ({"tolerance": 0.1, "min_reduction": 1.0}, "min_reduction = 1.0"),
        ({"tolerance": 0.1, "multiple_of": 0}, "multiple_of = 0"),
    ],
)
def test_a_configuration_is_checked_when_it_is_built(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CompreSSMConfig(**options)
