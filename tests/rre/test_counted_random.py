"""Draws that are cut off are those of the plain normal distribution, with what lies beyond drawn again."""

import math

import numpy as np

from rre.counted_random import generator, normal


def test_a_cutoff_draws_again_what_lies_beyond_and_keeps_the_rest():
    plain, cut = (normal(generator(3, "x"), (400, 250), 0.02, cutoff) for cutoff in (None, 1.5))
    inside = np.abs(plain) <= 1.5 * 0.02
    assert 0.85 < inside.mean() < 0.88  # P(|z| < 1.5) = 0.866
    np.testing.assert_array_equal(cut[inside], plain[inside])
    assert np.abs(cut).max() <= np.float32(1.5 * 0.02) and cut.dtype == np.float32
    # Variance of the truncated distribution: 1 - 2 c phi(c) / (2 Phi(c) - 1).
    density = math.exp(-1.5**2 / 2) / math.sqrt(2 * math.pi)
    expected = math.sqrt(1 - 3 * density / math.erf(1.5 / math.sqrt(2)))
    assert abs(cut.std() / 0.02 - expected) < 0.005


def test_without_a_cutoff_it_is_the_plain_draw():
    drawn = generator(3, "x").standard_normal((5, 7), np.float32) * np.float32(0.02)
    np.testing.assert_array_equal(normal(generator(3, "x"), (5, 7), 0.02), drawn)
