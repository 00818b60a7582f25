"""Measures of a layer's routing, by the formulas of OLMoE's analysis (Muennighoff et al. 2024, arXiv 2409.02060,
section 5).

Legend: T tokens, E experts of the layer, hits bool [T, E]: true where a token takes an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def saturation(hits: np.ndarray, final: np.ndarray) -> float:
    """Mean over tokens of |E_t(x) & E_final(x)| / |E_final(x)|: the share of the last checkpoint's choices that an
    earlier one made already, 1 for the last itself. Tokens that take no expert at the end do not count."""
    chosen = final.sum(axis=1)
    common = (hits & final).sum(axis=1)
    counted = chosen > 0
    return float((common[counted] / chosen[counted]).mean()) if counted.any() else float("nan")


def coactivation(hits: np.ndarray) -> np.ndarray:
    """[E, E]: of the tokens that take expert i (row), the share that takes expert j too, N_ij / N_i; 0 where N_i is 0.

    The diagonal is 1 where i took a token.
    """
    as_numbers = hits.astype(np.float32)
    together = as_numbers.T @ as_numbers
    taken = np.diag(together).copy()
    return together / np.maximum(taken, 1.0)[:, None]


def specialisation(hits: np.ndarray) -> np.ndarray:
    """[E]: the share of these tokens that each expert takes; over a domain's tokens its domain specialisation. The sum
    is the mean number of experts of a token."""
    return hits.mean(axis=0) if len(hits) else np.zeros(hits.shape[1])


@dataclass(frozen=True)
class VocabularyUse:
    """Vocabulary use: of every token id that occurs, `ids` [N] rising, `counts` [N], `shares` [N, E] of its occurrences
    by expert.
    """

    ids: np.ndarray
    counts: np.ndarray
    shares: np.ndarray

    @property
    def mean_largest(self) -> float:
        """Mean over occurrences of the largest share of the id: 1 where every id always meets the same expert."""
        return float(np.average(self.shares.max(axis=1), weights=self.counts)) if len(self.ids) else float("nan")

    def favourites(self, expert: int, count: int, min_occurrences: int) -> list[tuple[int, float, int]]:
        """(id, share, occurrences) of the ids that this expert takes the most of, among ids that occur
        `min_occurrences` times;
        equal shares by falling occurrences."""
        share = np.where(self.counts >= min_occurrences, self.shares[:, expert], 0.0)
        order = np.lexsort((self.ids, -self.counts, -share))[:count]
        return [(int(self.ids[n]), float(share[n]), int(self.counts[n])) for n in order if share[n] > 0]


def vocabulary_use(hits: np.ndarray, token_ids: np.ndarray) -> VocabularyUse:
    """The share of every token id's occurrences (`token_ids` [T]) that each expert takes."""
    ids, index, counts = np.unique(token_ids, return_inverse=True, return_counts=True)
    taken = np.zeros((len(ids), hits.shape[1]), np.float64)
    np.add.at(taken, index.reshape(-1), hits)
    return VocabularyUse(ids, counts, taken / np.maximum(counts, 1)[:, None])


def load(hits: np.ndarray) -> np.ndarray:
    """[E]: the share of all choices that fall on each expert; zeros where there is none."""
    taken = hits.sum(axis=0, dtype=np.float64)
    return taken / max(1.0, taken.sum())


def entropy(shares: np.ndarray) -> float:
    """-sum p ln p / ln E of shares [E] that sum to 1: 1 = even, 0 = all on one; 1 for a single expert."""
    if len(shares) < 2:
        return 1.0
    present = shares[shares > 0]
    return float(-(present * np.log(present)).sum() / np.log(len(shares)))


def imbalance(shares: np.ndarray) -> float:
    """The busiest expert's share over the mean share: 1 = even, E = all on one."""
    return float(shares.max() * len(shares)) if shares.sum() else float("nan")
