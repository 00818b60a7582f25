"""Deduplication: exact and near duplicates of documents, found by MinHash signatures and banding (Broder 1997).

A document is the set of its pieces of ``SHINGLE`` characters. One hash per piece, cut into ``BINS`` bins of which each
keeps its minimum (one-permutation hashing), gives a signature; the share of equal entries estimates the Jaccard
similarity of two documents. An empty bin takes another bin's value, chosen by a hash (Shrivastava 2017, "Optimal
densification"). Bands of signatures that are equal make candidates; of two near duplicates the later document goes.
Memory: half a KB a document.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rre.counted_random import bits64, key64, mix64

SHINGLE = 8  # characters; words would not do for Chinese or code
BINS = 128
ROWS = 6  # signature entries in a band: 21 bands find a pair of similarity 0.8 with probability 0.998
SIMILARITY = 0.8  # estimated Jaccard similarity from which two documents count as near duplicates
_EMPTY = np.uint32(0xFFFFFFFF)
_MULTIPLIER = 0x9E3779B97F4A7C15 | 1
_WHITESPACE = re.compile(r"\s+")
_KEY = key64("minhash")


def digest(text: str) -> bytes:
    """128-bit content hash of a document; equal texts, equal digests."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures uint32 [N, BINS] of N documents; case and the amount of white space do not count."""
    plain = [_WHITESPACE.sub(" ", text).strip().casefold().ljust(SHINGLE) for text in texts]
    if not plain:
        return np.empty((0, BINS), dtype=np.uint32)
    # 1. every document's characters in one row; a window of SHINGLE characters is one polynomial hash
    chars = np.frombuffer("".join(plain).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in plain])
    count = len(chars) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * np.uint64(_MULTIPLIER) + chars[offset : offset + count]
    hashes = mix64(hashes)
    # 2. leave out the windows that reach into the next document
    documents = np.repeat(np.arange(len(plain)), lengths)[:count]
    ends = np.cumsum(lengths)
    inside = np.arange(count) + SHINGLE <= ends[documents]
    hashes, documents = hashes[inside], documents[inside]
    # 3. the top bits choose the bin, the low 32 compete for its minimum
    table = np.full(len(plain) * BINS, _EMPTY, dtype=np.uint32)
    bins = (hashes >> np.uint64(64 - BINS.bit_length() + 1)).astype(np.int64)
    np.minimum.at(table, documents * BINS + bins, hashes.astype(np.uint32))
    return _densify(table.reshape(len(plain), BINS))


def _densify(table: np.ndarray) -> np.ndarray:
    """Fill empty bins from full ones; which one is tried depends on bin and attempt only, so equal sets stay equal."""
    rows, columns = np.nonzero(table == _EMPTY)
    filled = table.copy()
    attempt = 0
    while len(rows):
        donor = (bits64(_KEY, columns + attempt * BINS) % np.uint64(BINS)).astype(np.int64)
        value = table[rows, donor]
        filled[rows, columns] = value
        missing = value == _EMPTY
        rows, columns = rows[missing], columns[missing]
        attempt += 1
    return filled


@dataclass
class Deduplicator:
    """Deduplicator of documents in order: a duplicate of one kept before is dropped. Counts: ``exact`` and ``near``."""

    similarity: float = SIMILARITY
    exact: int = 0
    near: int = 0
    _digests: set[bytes] = field(default_factory=set)
    _kept: list[np.ndarray] = field(default_factory=list)  # signatures uint32 [BINS]
    _bands: list[dict[int, list[int]]] = field(default_factory=lambda: [{} for _ in range(BINS // ROWS)])

    def keep(self, texts: Sequence[str]) -> list[bool]:
        """For the next documents in order: True for the first of its kind, False for a duplicate of a kept one."""
        table = signatures(texts)
        banded = table[:, : BINS // ROWS * ROWS].reshape(len(texts), BINS // ROWS, ROWS).astype(np.uint64)
        keys = np.zeros(banded.shape[:2], dtype=np.uint64)
        for row in range(ROWS):
            keys = mix64(keys * np.uint64(_MULTIPLIER) + banded[:, :, row] + np.uint64(1))
        return [self._keep_one(text, table[row], keys[row].tolist()) for row, text in enumerate(texts)]

    def _keep_one(self, text: str, signature: np.ndarray, keys: list[int]) -> bool:
        name = digest(text)
        if name in self._digests:
            self.exact += 1
            return False
        candidates: set[int] = set()
        for band, key in zip(self._bands, keys, strict=True):
            candidates.update(band.get(key, ()))
        if candidates:
            others = np.stack([self._kept[index] for index in sorted(candidates)])
            if np.max(np.mean(others == signature, axis=1)) >= self.similarity:
                self.near += 1
                return False
        self._digests.add(name)
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(len(self._kept))
        self._kept.append(signature)
        return True
