"""The steps of a schedule are those that its shares say, whatever floating point makes of them."""

from fractions import Fraction

import pytest

from hf_compressm import CompreSSMSchedule


def settled(**changes) -> CompreSSMSchedule:
    return CompreSSMSchedule(trigger="settled", **({"start": 0.0, "end": 1.0, "monitor_steps": 1} | changes))


@pytest.mark.parametrize("share", range(1, 100))
def test_a_ranking_stands_still_for_exactly_the_share_that_was_asked_for(share):
    schedule = settled(settled_over=share / 100)
    assert schedule.settling_steps(100) == share
    assert schedule.settling_steps(50) == -(-share // 2)  # rounded up


@pytest.mark.parametrize("start", range(90))
def test_comparisons_begin_with_the_first_step_behind_the_start_of_the_window(start):
    schedule = settled(start=start / 100, settled_over=0.001)
    assert schedule.comparison_steps(100)[0] == max(start + 1, 2)  # a second measurement, one step after the first


@pytest.mark.parametrize(("steps", "start", "end"), [(10, 0.15, 0.45), (30, 0.1, 0.45), (30, 0.2, 0.85)])
def test_the_last_cut_and_the_last_comparison_end_the_same_window(steps, start, end):
    """With half a step at its end, where the sum of start and width falls on the other side."""
    schedule = settled(start=start, end=end, settled_over=0.01)
    assert (steps * Fraction(str(end))).denominator == 2
    assert schedule.event_steps(steps) == schedule.comparison_steps(steps)[-1:]


def test_the_published_schedules_stay():
    assert CompreSSMSchedule().event_steps(1000) == [25, 50, 75, 100]
    assert CompreSSMSchedule().event_steps(700) == [18, 35, 53, 70]
