"""Packed sequences: S + 1 tokens each, cut from a domain's documents by index, without building anything beforehand.

Training: each epoch strings all documents together in an order of its own, and the epochs follow each other as one
endless stream. Sequence i is the tokens i·S … i·S + S of that stream: neighbours share one token, so each token is a
label once. Documents cross sequence borders, and the last short piece of an epoch continues into the next: nothing is
dropped.

Held-out: one pass in a fixed order, begun by an end-of-document token, so that every held-out token is a label
exactly once; the last sequence is filled with padding, which the mask takes out.
"""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from pangu_sigma.data.indexed_dataset import IndexedDataset
from pangu_sigma.data.packed_rows import HeldoutRows
from rre.counted_random import key64, permutation

_ORDERS_KEPT = 2  # a sequence touches its epoch and perhaps the next


class _DocumentOrder:
    """Documents of a token store in a given order, read as one string of tokens."""

    def __init__(self, store: IndexedDataset, documents: np.ndarray):
        self._store = store
        self._documents = documents
        self._starts = np.concatenate(([0], np.cumsum(store.lengths[documents])))

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens int32 [count] from position ``start`` of the string."""
        out = np.empty(count, dtype=np.int32)
        filled = 0
        position = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < count:
            inside = start + filled - int(self._starts[position])
            document = int(self._documents[position])
            take = min(count - filled, int(self._store.lengths[document]) - inside)
            begin = int(self._store.offsets[document]) + inside
            out[filled : filled + take] = self._store.read(begin, take)
            filled += take
            position += 1
        return out


class PackedSequences:
    """Training sequences of one domain, without end.

    The order of an epoch is a function of (seed, domain, epoch) alone. ``identity`` names what the numbering depends on
    (``DomainStore.identity``); a checkpoint keeps it and compares. Not for several threads at once.
    """

    def __init__(
        self,
        domain: str,
        store: IndexedDataset,
        sequence_length: int,
        seed: int,
        identity: Mapping[str, str] | None = None,
    ):
        if sequence_length < 1 or store.tokens < 1:
            raise ValueError(f"{domain}: sequences of {sequence_length} from {store.tokens} tokens cannot be packed")
        self.domain = domain
        self.sequence_length = sequence_length
        self.identity = {**(identity or {}), "sequence length": str(sequence_length), "seed": str(seed)}
        self._store = store
        self._seed = seed
        self._orders: OrderedDict[int, _DocumentOrder] = OrderedDict()

    def sequence(self, index: int) -> np.ndarray:
        """Sequence ``index`` (0, 1, 2 … without end): int32 [S + 1]."""
        if index < 0:
            raise IndexError(f"{self.domain}: no sequence {index}")
        out = np.empty(self.sequence_length + 1, dtype=np.int32)
        epoch, start = divmod(index * self.sequence_length, self._store.tokens)
        filled = 0
        while filled < len(out):
            take = min(len(out) - filled, self._store.tokens - start)
            out[filled : filled + take] = self._order(epoch).read(start, take)
            filled += take
            epoch, start = epoch + 1, 0
        return out

    def _order(self, epoch: int) -> _DocumentOrder:
        if epoch not in self._orders:
            key = key64(self._seed, "order", self.domain, epoch)
            self._orders[epoch] = _DocumentOrder(self._store, permutation(key, self._store.documents))
            while len(self._orders) > _ORDERS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]


class HeldoutSequences(HeldoutRows):
    """Held-out sequences of one domain: ``len()`` of them, every held-out token a label exactly once.

    The documents come in a fixed mixed order that no seed changes, so the first few sequences are a fair sample and
    always the same.
    """

    def __init__(self, store: IndexedDataset, sequence_length: int, eod_id: int, pad_id: int):
        if sequence_length < 1 or store.tokens < 1:
            raise ValueError(f"sequences of {sequence_length} from {store.tokens} held-out tokens cannot be packed")
        super().__init__(sequence_length, pad_id)
        self.tokens = store.tokens
        self._eod_id = eod_id
        self._order = _DocumentOrder(store, permutation(key64("heldout"), store.documents))

    def __len__(self) -> int:
        return -(-self.tokens // self.sequence_length)

    def label_counts(self, vocab_size: int, sequences: int) -> np.ndarray:
        """How often every vocabulary id is a label of the first so many sequences, int64 [vocab_size]."""
        labels = self._order.read(0, min(self.tokens, sequences * self.sequence_length))
        return np.bincount(labels, minlength=vocab_size)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequence int32 [S + 1] and the mask float32 [S] of its labels (0 where the label is padding)."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} held-out sequences, no number {index}")
        # the stream is one end-of-document token, then the documents: its position p is token p - 1
        start = index * self.sequence_length
        labels = min(self.sequence_length, self.tokens - start)
        out = np.full(self.sequence_length + 1, self.pad_id, dtype=np.int32)
        out[0] = self._eod_id if start == 0 else self._order.read(start - 1, 1)[0]
        out[1 : labels + 1] = self._order.read(start, labels)
        mask = (np.arange(self.sequence_length) < labels).astype(np.float32)
        return out, mask


def first_sequences(heldout: Mapping[str, HeldoutSequences], count: int) -> dict[str, np.ndarray]:
    """The first `count` held-out sequences of every domain, int32 [n, S + 1], or all of fewer: the probe with which a
    checkpoint's model can be verified alone. Nothing where `count` is 0."""
    return {
        name: np.stack([sequences.sequence(i)[0] for i in range(min(count, len(sequences)))])
        for name, sequences in heldout.items()
        if count
    }
