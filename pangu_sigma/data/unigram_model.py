"""The unigram model: every token predicted from its frequency alone, which any language model must beat."""

import numpy as np

from pangu_sigma.data.indexed_dataset import IndexedTokens


def unigram_loss(token_counts: np.ndarray, heldout: IndexedTokens) -> float:
    """Mean negative log likelihood (nats per token) of the held-out tokens under the training part's frequencies.

    ``token_counts`` int64 [V]; one is added to every count, so that a token never seen has a probability.
    """
    vocabulary = len(token_counts)
    log_p = np.log(token_counts + 1.0) - np.log(token_counts.sum() + vocabulary)
    counts = heldout.counts(vocabulary)
    return float(-(counts * log_p).sum() / counts.sum())
