"""Mixture of domains that write a text whose domain is inferred: which domains, and with what weight.

The prompt gives P(domain | prompt) for every domain (`domain_inference`); the `top` best of them write together. Each
token's probability is the mean of theirs, weighted by their posterior, which every written token moves on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pangu_sigma.errors import UserError, argument
from pangu_sigma.generation.domain_inference import auto_order, cached_prior, next_prior, posteriors
from pangu_sigma.generation.sampling import log_softmax


class DomainInference:
    """Domain inference of an engine: the candidates, their prior, and how many of them write a text together.

    candidates: ids of the domains that a text may belong to. top: how many of them write a text together.
    prior: [len(candidates)], None for a uniform one. updating: whether the prior follows the prompts, as a moving mean
    of their posteriors. Raises UserError for a `top` that there are no domains for.
    """

    def __init__(
        self, candidates: Sequence[int], top: int = 1, prior: np.ndarray | None = None, updating: bool = False
    ) -> None:
        self.candidates = tuple(candidates)
        if not 1 <= top <= len(self.candidates):
            raise UserError(
                f"{argument('top', top)} is more than the {len(self.candidates)} domains there are: set it lower"
            )
        self.top = top
        uniform = np.full(len(self.candidates), 1.0 / len(self.candidates))
        self.prior = uniform if prior is None else np.asarray(prior, np.float64)
        self.updating = updating

    def begin(self, log_likelihood: np.ndarray, able: np.ndarray | None = None) -> DomainMixture:
        """The mixture that continues a prompt; log_likelihood [len(candidates), n]: of its tokens but the first.

        able [len(candidates)]: which domains can write at all (None: every one), at least one. An updating prior learns
        from the prompt. What the model itself writes later is no evidence of what will be asked.
        """
        posterior = posteriors(log_likelihood, self.prior if able is None else np.where(able, self.prior, 0.0))[:, -1]
        if self.updating:
            self.prior = next_prior(self.prior, posterior)
        order = auto_order(posterior[:, None], self.top if able is None else min(self.top, int(able.sum())))[:, 0]
        return DomainMixture(tuple(self.candidates[index] for index in order), posterior[order])

    def rows(self, log_probabilities: np.ndarray, posterior: np.ndarray) -> np.ndarray:
        """Log probabilities float64 [n, V] after each of n tokens: of the `top` best domains after each, mixed.

        log_probabilities [len(candidates), n, V]: under every domain. posterior [len(candidates), n]: of the domains
        after each token.
        """
        order = auto_order(posterior, self.top)
        rows = []
        for token in range(posterior.shape[1]):
            best = order[:, token]
            mixture = DomainMixture(tuple(best), posterior[best, token])
            rows.append(mixture.mixed(list(log_probabilities[best, token])))
        return np.stack(rows)

    def cache(self, log_likelihoods: Sequence[np.ndarray]) -> None:
        """Take the prior that some texts suggest, each [len(candidates), n]; see `cached_prior`."""
        self.prior = cached_prior(log_likelihoods)


class DomainMixture:
    """Mixture of the domains that write one text, best first, with their posterior weights (summing to 1)."""

    def __init__(self, members: tuple[int, ...], weights: np.ndarray) -> None:
        self.members = members
        self.probability = np.asarray(weights, np.float64)  # among all domains, where the text begins
        self.log_weights = np.log(np.maximum(self.probability, np.finfo(np.float64).tiny))
        self._normalise()

    def mixed(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """The next token's distribution [V] as logarithms, from every member's logits [V]; of one member its logits."""
        if len(self.members) == 1:
            return logits[0]
        terms = log_softmax(np.stack(logits)) + self.log_weights[:, None]
        best = terms.max(axis=0)
        return best + np.log(np.exp(terms - best).sum(axis=0))

    def update(self, token: int, logits: Sequence[np.ndarray]) -> None:
        """Update the posterior with the token that was written; logits as for `mixed`."""
        if len(self.members) > 1:
            self.log_weights = self.log_weights + log_softmax(np.stack(logits))[:, token]
            self._normalise()

    @property
    def weights(self) -> np.ndarray:
        """The posterior among the members now [m]."""
        return np.exp(self.log_weights)

    def _normalise(self) -> None:
        best = self.log_weights.max()
        self.log_weights = self.log_weights - best - np.log(np.exp(self.log_weights - best).sum())
