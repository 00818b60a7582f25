"""Domain inference: the domain a text belongs to, by its likelihood under each domain's experts; pure arithmetic.

P(domain | text so far) is proportional to P(text so far | domain) P(domain) (DEMix layers, arXiv 2108.05036). The prior
is uniform, updated along a series of sequences, or cached from some of them beforehand. The next token's probability is
that of the best domain, or the mean over the m best, weighted by the posterior.

Shapes: G domains, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Prior = Literal["uniform", "updating", "cached"]
DECAY = 0.3  # weight of the newest sequence in an updated prior, DEMix's value


def token_log_probabilities(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log softmax(logits)[label]: float64 of the labels' shape [...]; logits [..., V]."""
    rows = logits.astype(np.float64)
    top = rows.max(axis=-1, keepdims=True)
    normaliser = top[..., 0] + np.log(np.exp(rows - top).sum(axis=-1))
    return np.take_along_axis(rows, labels[..., None].astype(np.int64), axis=-1)[..., 0] - normaliser


def posteriors(log_likelihood: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """P(domain | the tokens before t) for t = 0 … S: float64 [G, S + 1], column 0 being `prior` [G].

    log_likelihood [G, S]: every token's log probability, given the tokens before it, under each domain.
    """
    with np.errstate(divide="ignore"):
        start = np.log(np.asarray(prior, np.float64))[:, None]
    scores = start + np.concatenate([np.zeros_like(start), np.cumsum(log_likelihood, axis=1, dtype=np.float64)], axis=1)
    weights = np.exp(scores - scores.max(axis=0))
    return weights / weights.sum(axis=0)


def auto_order(posterior: np.ndarray, top: int) -> np.ndarray:
    """Indices of the `top` best domains, best first: [min(top, G), S] of posterior [G, S]; ties: the earlier domain."""
    return np.argsort(-posterior, axis=0, kind="stable")[:top]


def auto_log_probabilities(log_likelihood: np.ndarray, posterior: np.ndarray, top: int = 1) -> np.ndarray:
    """log P(token t | tokens before) without a given domain: float64 [S], from the `top` best domains before t.

    posterior [G, S + 1] as `posteriors` gives it; ties go to the earlier domain.
    """
    weights = posterior[:, : log_likelihood.shape[1]]
    order = auto_order(weights, top)
    chosen = np.take_along_axis(weights, order, axis=0)
    with np.errstate(divide="ignore"):
        terms = np.log(chosen / chosen.sum(axis=0)) + np.take_along_axis(log_likelihood, order, axis=0)
    best = terms.max(axis=0)
    return best + np.log(np.exp(terms - best).sum(axis=0))


def next_prior(prior: np.ndarray, posterior: np.ndarray, decay: float = DECAY) -> np.ndarray:
    """The prior [G] of the sequence after one whose posterior at its end was `posterior` [G]: a moving mean."""
    mixed = (1.0 - decay) * np.asarray(prior, np.float64) + decay * np.asarray(posterior, np.float64)
    return mixed / mixed.sum()


def cached_prior(log_likelihoods: Sequence[np.ndarray]) -> np.ndarray:
    """The prior [G] that a few sequences of the same source suggest: the mean of their posteriors at their ends."""
    domains = log_likelihoods[0].shape[0]
    uniform = np.full(domains, 1.0 / domains)
    return np.mean([posteriors(rows, uniform)[:, -1] for rows in log_likelihoods], axis=0)
