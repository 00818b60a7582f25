"""Which domain an unknown text belongs to, by how likely each domain's experts find it; pure arithmetic.

P(domain | text so far) is proportional to P(text so far | domain) P(domain) (DEMix layers, arXiv 2108.05036). The prior
is uniform, updated along a series of sequences, or cached from some of them beforehand. The next token's probability is
that of the best domain, or the mean over the m best, weighted by the posterior.

Shapes: G domains, S tokens.
"""

from __future__ import annotations

import math
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
    """Numbers of the `top` best domains, best first: [min(top, G), S] of posterior [G, S]; ties: the earlier domain."""
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
    return np.mean([posteriors(found, uniform)[:, -1] for found in log_likelihoods], axis=0)


class UnknownText:
    """Measures texts of one domain (number `own` of G) as if nobody knew whose they are, one sequence after another.

    `own` None: the model has no experts of this domain, so nothing can be given and no answer is right. `after`:
    numbers of tokens after which the best domain is compared with the right one. Sequences come in the order of the
    text, which matters for the updated prior. loss: nats per token.
    """

    def __init__(
        self,
        domains: int,
        own: int | None,
        kind: Prior,
        top: int,
        after: Sequence[int],
        cached: np.ndarray | None = None,
    ) -> None:
        if kind == "cached" and cached is None:
            raise ValueError("a cached prior needs its sequences")
        self.own, self.kind, self.top = own, kind, top
        self.prior = cached if kind == "cached" else np.full(domains, 1.0 / domains)
        self.right = dict.fromkeys(after, 0)
        self.seen = dict.fromkeys(after, 0)
        self.tokens = 0
        self._auto = 0.0
        self._given = 0.0

    def add(self, log_likelihood: np.ndarray) -> None:
        """One sequence: log_likelihood [G, n] of its n tokens, padding left out."""
        posterior = posteriors(log_likelihood, self.prior)
        for after in self.right:
            if after <= log_likelihood.shape[1]:
                self.seen[after] += 1
                self.right[after] += int(np.argmax(posterior[:, after]) == self.own)
        self._auto -= float(auto_log_probabilities(log_likelihood, posterior, self.top).sum())
        if self.own is not None:
            self._given -= float(log_likelihood[self.own].sum())
        self.tokens += log_likelihood.shape[1]
        if self.kind == "updating":
            self.prior = next_prior(self.prior, posterior[:, -1])

    def result(self) -> dict:
        """loss with the domain inferred and given, accuracy by number of tokens (None: no sequence so long).

        Without a domain of its own `given` and every accuracy are None.
        """
        known = self.own is not None
        return {
            "auto": self._auto / self.tokens if self.tokens else math.nan,
            "given": None if not known else self._given / self.tokens if self.tokens else math.nan,
            "accuracy": {
                after: self.right[after] / self.seen[after] if known and self.seen[after] else None
                for after in self.right
            },
            "tokens": self.tokens,
        }
