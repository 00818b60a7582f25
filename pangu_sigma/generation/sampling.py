"""Sampling of a token from logits: repetition penalty, temperature, top-k, top-p, a counted draw; log-probabilities."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from pangu_sigma.generation.request import Alternatives, Sampling
from rre.counted_random import key64, uniform


def sample_token(logits: np.ndarray, sampling: Sampling, index: int, seen: Collection[int]) -> int:
    """Sample the answer's token `index` (from 0) given logits float32 [V] and the ids `seen` so far, prompt included.

    Order of the rules: penalty, temperature, top-k, top-p. Ties at top-k's border are all kept; top-p keeps the
    likeliest until their sum reaches it, lower ids first among equals. An id whose logit is minus infinity is never
    drawn.
    """
    scores = logits.astype(np.float64)
    if sampling.repetition_penalty != 1.0 and seen:
        ids = np.fromiter(seen, np.int64)
        repeated = scores[ids]
        scores[ids] = np.where(
            repeated > 0, repeated / sampling.repetition_penalty, repeated * sampling.repetition_penalty
        )
    if sampling.temperature == 0.0:
        return int(np.argmax(scores))
    scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    p = np.exp(scores)
    p /= p.sum()
    if sampling.top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        # A token stays if those before it do not reach the share yet: the first one always does.
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= sampling.top_p]] = 0.0
        p /= p.sum()
    drawn = uniform(key64(sampling.seed, "generate"), np.array([index]))[0]
    cumulative = np.cumsum(p)
    # The sum may end an ulp below 1; the draw is below 1, so scaling it keeps it inside.
    return int(np.searchsorted(cumulative, drawn * cumulative[-1], side="right"))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities float64 [..., V] of logits [..., V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def likeliest(logprobs: np.ndarray, count: int) -> Alternatives:
    """The `count` best (id, log-probability) of logprobs [V], best first, lower id first among equals; none that is
    impossible."""
    if count <= 0:
        return ()
    count = min(count, logprobs.size)
    border = np.partition(logprobs, -count)[-count]
    ids = np.flatnonzero((logprobs >= border) & (logprobs > -np.inf))
    best = ids[np.argsort(-logprobs[ids], kind="stable")][:count]
    return tuple((int(i), float(logprobs[i])) for i in best)
