"""Rankings of states: their correlation, the distance of their score shares, and what lies within the noise."""

import itertools

import pytest
import torch

from hf_compressm.theory.rankings import Ranking, is_within_noise, rank_correlation, share_distance


def test_rank_correlation_counts_pairs_and_leaves_ties_out():
    def by_pairs(x, y):
        score = pairs_x = pairs_y = 0
        for i, j in itertools.combinations(range(len(x)), 2):
            a, b = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            score, pairs_x, pairs_y = score + a * b, pairs_x + abs(a), pairs_y + abs(b)
        return score / (pairs_x * pairs_y) ** 0.5

    generator = torch.Generator().manual_seed(0)
    for size in (2, 5, 33):
        x = torch.rand(size, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 4, (size,), generator=generator).double() + x.round()
        if len(y.unique()) > 1:
            assert rank_correlation(x, y) == pytest.approx(by_pairs(x.tolist(), y.tolist()), abs=1e-12)
        assert rank_correlation(x, 3 * x) == pytest.approx(1) and rank_correlation(x, -x) == pytest.approx(-1)
    # Kendall's own kind of table: 12 = 15 - 3 pairs agree of 15 untied in x and 14 in y.
    x, y = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([1.0, 1, 2, 4, 3, 5])
    assert rank_correlation(x, y) == pytest.approx((13 - 1) / (15 * 14) ** 0.5)
    flat = torch.ones(4)
    assert (rank_correlation(flat, flat), rank_correlation(flat, torch.rand(4))) == (1.0, 0.0)


def test_share_distance_is_the_score_that_changed_its_state():
    left, right = torch.tensor([3.0, 1, 0, 0]), torch.tensor([2.0, 2, 2, 2])
    assert share_distance(left, right) == pytest.approx(0.5)
    assert share_distance(left, 7 * left) == pytest.approx(0) and share_distance(left, left.flip(0)) == pytest.approx(
        1
    )


def test_a_layer_stands_still_only_within_the_noise_and_where_there_is_a_ranking_at_all():
    noise = Ranking(correlation=0.7, distance=0.1)
    assert is_within_noise(Ranking(0.7, 0.1), noise)
    assert not is_within_noise(Ranking(0.69, 0.1), noise)  # the order moved
    assert not is_within_noise(Ranking(0.7, 0.11), noise)  # the shares moved
    assert not is_within_noise(Ranking(1.0, 0.0), Ranking(0.4, 0.3))  # two draws disagree: nothing is known
