"""Deduplication: exact copies of documents, found by their digests, and near duplicates, by MinHash (Broder 1997).

For near duplicates a document is the set of its pieces of ``SHINGLE`` characters, as they are written: capitals and
white space count, because in formulas, code and tables they carry the meaning. One hash per piece, cut into ``BINS``
bins of which each keeps its minimum (one-permutation hashing), gives a signature; the share of equal entries estimates
the Jaccard similarity of two documents. An empty bin takes another bin's value, chosen by a hash (Shrivastava 2017,
"Optimal densification"). Bands of signatures that are equal make candidates; of two near duplicates the later document
goes. Memory: a tenth of a KB a document, for near duplicates half a KB more.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rre.counted_random import bits64, key64, mix64

SHINGLE = 8  # characters; words would not do for Chinese or code
BINS = 128
ROWS = 6  # signature entries in a band: 21 bands find a pair of similarity 0.8 with probability 0.998
SIMILARITY = 0.8  # estimated Jaccard similarity from which two documents count as near duplicates
_EMPTY = np.uint32(0xFFFFFFFF)
_MULTIPLIER = 0x9E3779B97F4A7C15 | 1
_KEY = key64("minhash")


def digest(text: str) -> bytes:
    """128-bit content hash of a document; equal texts, equal digests."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures uint32 [N, BINS] of N documents; short ones are filled up with blanks."""
    plain = [text.ljust(SHINGLE) for text in texts]
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


@dataclass(frozen=True)
class Duplicate:
    """What a document is a copy of: the ``reason`` to drop it, and the number of the earlier document, from 0."""

    reason: Literal["exact", "near"]
    original: int


@dataclass
class Deduplicator:
    """Finder of duplicates among documents in order: of equal ones (``exact``), of similar ones too (``near``), the
    first stays.

    ``similarity``: estimated Jaccard similarity from which two documents are near duplicates.
    """

    kind: Literal["exact", "near"]
    similarity: float = SIMILARITY
    _seen: int = 0
    _digests: dict[bytes, int] = field(default_factory=dict)  # -> number of the first document that has it
    _kept: list[int] = field(default_factory=list)  # numbers of the documents whose signatures are kept
    _signatures: list[np.ndarray] = field(default_factory=list)  # uint32 [BINS]
    _bands: list[dict[int, list[int]]] = field(default_factory=lambda: [{} for _ in range(BINS // ROWS)])

    def duplicates(self, texts: Sequence[str]) -> list[Duplicate | None]:
        """For each of the next documents in order: what it is a copy of, None for the first of its kind."""
        if self.kind == "exact":
            return [self._exact(text) for text in texts]
        table = signatures(texts)
        banded = table[:, : BINS // ROWS * ROWS].reshape(len(texts), BINS // ROWS, ROWS).astype(np.uint64)
        keys = np.zeros(banded.shape[:2], dtype=np.uint64)
        for row in range(ROWS):
            keys = mix64(keys * np.uint64(_MULTIPLIER) + banded[:, :, row] + np.uint64(1))
        return [self._exact(text) or self._near(table[row], keys[row].tolist()) for row, text in enumerate(texts)]

    def _exact(self, text: str) -> Duplicate | None:
        number, self._seen = self._seen, self._seen + 1
        original = self._digests.setdefault(digest(text), number)
        return None if original == number else Duplicate("exact", original)

    def _near(self, signature: np.ndarray, keys: list[int]) -> Duplicate | None:
        """What the document that `_exact` was asked of last resembles; of none, it is kept."""
        candidates = sorted({index for band, key in zip(self._bands, keys, strict=True) for index in band.get(key, ())})
        if candidates:
            shares = np.mean(np.stack([self._signatures[index] for index in candidates]) == signature, axis=1)
            if shares.max() >= self.similarity:
                return Duplicate("near", self._kept[candidates[int(shares.argmax())]])
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(len(self._kept))
        self._kept.append(self._seen - 1)
        self._signatures.append(signature)
        return None
