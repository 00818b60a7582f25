"""Inferring a domain, against Bayes' rule written out."""

import math

import numpy as np
import pytest

from pangu_sigma.generation.domain_inference import (
    auto_log_probabilities,
    cached_prior,
    next_prior,
    posteriors,
    token_log_probabilities,
)

DRAW = np.random.default_rng(0)
LIKELIHOOD = np.log(DRAW.uniform(0.1, 0.9, (3, 5)))


def test_the_posterior_is_bayes_rule():
    prior = np.array([0.5, 0.2, 0.3])
    posterior = posteriors(LIKELIHOOD, prior)
    assert posterior.shape == (3, 6)
    for t in range(6):
        products = [prior[g] * math.prod(math.exp(v) for v in LIKELIHOOD[g, :t]) for g in range(3)]
        np.testing.assert_allclose(posterior[:, t], np.array(products) / sum(products), rtol=1e-12)


def test_long_texts_do_not_underflow():
    posterior = posteriors(np.stack([np.full(100_000, -9.0), np.full(100_000, -9.1)]), np.array([0.5, 0.5]))
    assert posterior[:, -1] == pytest.approx([1.0, 0.0]) and np.isfinite(posterior).all()


def test_the_best_domain_speaks_alone_and_the_best_ones_mix_by_their_weight():
    posterior = posteriors(LIKELIHOOD, np.full(3, 1 / 3))
    alone, mixed = (auto_log_probabilities(LIKELIHOOD, posterior, top) for top in (1, 2))
    for t in range(5):
        first, second = np.argsort(-posterior[:, t], kind="stable")[:2]
        assert alone[t] == pytest.approx(LIKELIHOOD[first, t])
        share = posterior[first, t] / (posterior[first, t] + posterior[second, t])
        expected = share * math.exp(LIKELIHOOD[first, t]) + (1 - share) * math.exp(LIKELIHOOD[second, t])
        assert mixed[t] == pytest.approx(math.log(expected))


def test_all_domains_mixed_are_the_text_under_the_prior():
    # Bayes: the product of the mixture's next-token probabilities is the text's probability under the prior.
    prior = np.array([0.5, 0.2, 0.3])
    total = auto_log_probabilities(LIKELIHOOD, posteriors(LIKELIHOOD, prior), 3).sum()
    assert math.exp(total) == pytest.approx(float(prior @ np.exp(LIKELIHOOD.sum(axis=1))))


def test_log_probabilities_are_the_log_softmax():
    logits, labels = DRAW.normal(size=(2, 4, 7)).astype(np.float32) * 30, DRAW.integers(0, 7, (2, 4))
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    expected = np.log([[shares[b, s, labels[b, s]] for s in range(4)] for b in range(2)])
    np.testing.assert_allclose(token_log_probabilities(logits, labels), expected, rtol=1e-10)


def test_priors_follow_what_was_read():
    assert next_prior(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == pytest.approx([0.65, 0.35])
    ends = [posteriors(LIKELIHOOD[:, i:], np.full(3, 1 / 3))[:, -1] for i in range(2)]
    assert cached_prior([LIKELIHOOD, LIKELIHOOD[:, 1:]]) == pytest.approx(np.mean(ends, axis=0))
