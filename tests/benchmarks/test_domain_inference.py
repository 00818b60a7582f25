"""The benchmark of inferred domains: its figures against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.domain_inference import mixed_documents, short_texts

# Two groups, four tokens: the first is right with 0.6 a token, the other with 0.2.
TEXT = np.log(np.array([[0.6] * 4, [0.2] * 4]))


def test_the_cost_of_a_mixture_is_that_of_bayes():
    figures = short_texts([TEXT], own=0, after=(1, 4, 9))
    assert list(figures) == [1, 4]
    for length, measured in figures.items():
        assert measured["inferred"] == [1.0, 0.0]
        mixture = math.log(0.5 * 0.6**length + 0.5 * 0.2**length)
        assert measured["mixed"] == pytest.approx((length * math.log(0.6) - mixture) / length)
        assert measured["mixed"] <= math.log(2) / length
    assert short_texts([TEXT], own=1, after=(4,))[4]["inferred"] == [1.0, 0.0]


def test_a_mixed_document_is_compared_with_each_half_under_its_own_group():
    text = np.log(np.array([[0.6, 0.6, 0.2, 0.2], [0.2, 0.2, 0.6, 0.6]]))
    costs = mixed_documents([text], 0, 1, half=2)
    assert costs["one"] == pytest.approx(2 * math.log(3) / 4)
    mixture = math.log(0.5 * 0.6**2 * 0.2**2 * 2)
    assert costs["mixed"] == pytest.approx((4 * math.log(0.6) - mixture) / 4)
    assert mixed_documents([], 0, 1, half=2) is None
