"""The measures on constructed routings whose values are known."""

import math

import numpy as np
import pytest

from pangu_sigma.evaluation import routing_measures


def hits(*rows: str) -> np.ndarray:
    """One row of 0 and 1 per token."""
    return np.array([[c == "1" for c in row] for row in rows])


def test_saturation_is_the_share_of_final_choices_that_were_made_before():
    final = hits("1100", "1010", "0011")
    assert routing_measures.saturation(final, final) == 1.0
    assert routing_measures.saturation(hits("0011", "0101", "1100"), final) == 0.0
    assert routing_measures.saturation(hits("1001", "1010", "1100"), final) == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_a_token_without_an_expert_at_the_end_does_not_count_towards_saturation():
    assert routing_measures.saturation(hits("10", "10"), hits("10", "00")) == 1.0
    assert math.isnan(routing_measures.saturation(hits("10"), hits("00")))


def test_coactivation_is_relative_to_the_row_s_expert():
    measured = routing_measures.coactivation(hits("110", "101", "100", "100"))
    np.testing.assert_allclose(measured, [[1, 1 / 4, 1 / 4], [1, 1, 0], [1, 0, 1]])
    assert not routing_measures.coactivation(hits("100", "100"))[1].any()


def test_specialisation_of_a_domain_sums_to_the_experts_of_a_token():
    measured = routing_measures.specialisation(hits("110", "101", "110", "110"))
    np.testing.assert_allclose(measured, [1.0, 0.75, 0.25])
    assert measured.sum() == 2.0


def test_vocabulary_use():
    use = routing_measures.vocabulary_use(hits("10", "10", "01", "10", "01"), np.array([7, 7, 7, 3, 9]))
    np.testing.assert_array_equal(use.ids, [3, 7, 9])
    np.testing.assert_array_equal(use.counts, [1, 3, 1])
    np.testing.assert_allclose(use.shares, [[1, 0], [2 / 3, 1 / 3], [0, 1]])
    assert use.mean_largest == pytest.approx((1 + 3 * 2 / 3 + 1) / 5)
    assert use.favourites(0, 2, 1) == [(3, 1.0, 1), (7, pytest.approx(2 / 3), 3)]
    assert use.favourites(0, 2, 2) == [(7, pytest.approx(2 / 3), 3)]
    assert use.favourites(1, 1, 4) == []


def test_even_and_uneven_loads():
    even, one = routing_measures.load(hits("10", "01", "10", "01")), routing_measures.load(hits("10", "10"))
    assert (routing_measures.entropy(even), routing_measures.imbalance(even)) == (1.0, 1.0)
    assert (routing_measures.entropy(one), routing_measures.imbalance(one)) == (0.0, 2.0)
    skewed = np.array([0.5, 0.25, 0.25, 0.0])
    assert routing_measures.entropy(skewed) == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert routing_measures.imbalance(skewed) == 2.0
    assert routing_measures.entropy(np.array([1.0])) == 1.0
