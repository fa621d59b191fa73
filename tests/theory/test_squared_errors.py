"""What is compared between layers is a squared error, whatever power of it a criterion's score is."""

import pytest
import torch

from hf_compressm import CompreSSMConfig, analyze
from hf_compressm.theory.criteria import CRITERIA, score_power, squared_errors
from hf_compressm.theory.group_criteria import GROUP_CRITERIA
from hf_compressm.theory.selective import unexplained_shares

AMPLITUDES = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)


def test_amplitudes_are_squared_and_squares_are_not():
    expected = torch.tensor([14.0, 5.0, 1.0, 0.0], dtype=torch.float64)  # all, then without 3, then without 2
    torch.testing.assert_close(squared_errors(AMPLITUDES, 1), expected)
    torch.testing.assert_close(squared_errors(AMPLITUDES.square(), 2), expected)


def test_of_states_that_others_make_up_for_only_what_they_do_not_predict_counts():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    covariance = states.T @ states
    errors = squared_errors(AMPLITUDES, 1, covariance)
    share = unexplained_shares(covariance, torch.tensor([0, 2]))
    assert errors[2] == pytest.approx(float(share)) and errors[3] == 0 and errors[0] == 14


def test_every_criterion_says_its_power_and_an_own_one_may():
    squares = {name for name in CRITERIA if score_power(name) == 2}
    assert squares == {"greedy", "aire", "last", "taylor"}

    def own(layer):
        return CRITERIA["output"](layer).square()

    assert score_power(own) == 1
    own.power = 2
    assert score_power(own) == 2


def test_scores_of_one_name_are_of_one_kind_in_both_families():
    """A record has the name alone."""
    for name in CRITERIA.keys() & GROUP_CRITERIA.keys():
        of_states, of_groups = CRITERIA[name], GROUP_CRITERIA[name]
        assert (of_states.power, of_states.is_conditional) == (of_groups.power, of_groups.is_conditional), name


def test_what_a_score_has_discounted_is_not_discounted_again(trained, batches):
    """The scores of `greedy` lack what others predict, so a global allocation compares their sums as they are."""
    model, _ = trained

    def own(layer):
        return CRITERIA["greedy"](layer)

    own.power = 2

    def sizes_by(criterion):
        config = CompreSSMConfig(tolerance=0.1, allocation="global", criterion=criterion)
        return analyze(model, batches, config).state_sizes

    assert sizes_by(own) != sizes_by("greedy")
    own.is_conditional = True
    assert sizes_by(own) == sizes_by("greedy")


def test_a_global_allocation_is_the_same_by_a_score_and_by_its_square(trained, batches):
    """Squares of amplitudes were squared once more, so that layers were weighed by a fourth power."""
    model, _ = trained

    def squared_output(layer):
        return CRITERIA["output"](layer).square()

    squared_output.power = 2
    sizes = []
    for criterion in ("output", squared_output):
        config = CompreSSMConfig(tolerance=0.3, allocation="global", criterion=criterion)
        sizes.append(analyze(model, batches, config).state_sizes)
    assert sizes[0] == sizes[1] and len(set(sizes[0].values())) == 2
    squared_output.power = 1
    assert analyze(model, batches, config).state_sizes != sizes[0]
