"""Examples as rows of S + 1 tokens: packed one behind the other for sft, a pair in two rows for dpo.

Attention and positions restart after every end-of-document token, which ends each example, so an example in a packed
row is computed as if it stood alone. Only labels of answers count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pangu_sigma.data.mixture_sampler import Batch, MixtureSampler, Weights
from pangu_sigma.data.packed_rows import TokenSequence, pack_in_order, packed_row
from pangu_sigma.finetuning.examples import ExampleSet
from rre.counted_random import key64, permutation


class PackedExamples:
    """The endless rows of one domain's sft examples, in an order that is drawn anew for each epoch."""

    rows = 1

    def __init__(self, examples: ExampleSet, length: int, pad_id: int, seed: int) -> None:
        self.domain, self.sequence_length = examples.name, length
        self.identity = {"example file": examples.fingerprint, "seed": str(seed)}
        self._sequences = [answers[0] for answers in examples.train]
        self._lengths = np.array([len(sequence.ids) for sequence in self._sequences], np.int64)
        self._pad_id, self._seed = pad_id, seed
        self._first = [0]  # the first row of every epoch that was packed so far
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None  # an epoch, its order and where its rows begin

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `index` (0, 1, 2 … without end): tokens [1, S + 1], mask [1, S], padding [1, S]; see `packed_row`."""
        while self._first[-1] <= index:
            _, starts = self._epoch(len(self._first) - 1)
            self._first.append(self._first[-1] + len(starts) - 1)
        epoch = int(np.searchsorted(self._first, index, side="right")) - 1
        order, starts = self._epoch(epoch)
        row = index - self._first[epoch]
        chosen = [self._sequences[i] for i in order[starts[row] : starts[row + 1]]]
        return tuple(part[None] for part in packed_row(chosen, self.sequence_length, self._pad_id))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._kept is None or self._kept[0] != epoch:
            order = permutation(key64(self._seed, "examples", self.domain, epoch), len(self._sequences))
            self._kept = epoch, order, pack_in_order(self._lengths[order], self.sequence_length + 1)
        return self._kept[1:]


class PairedExamples:
    """The endless pairs of one domain's dpo examples: two rows each, the chosen answer's first."""

    rows = 2

    def __init__(self, examples: ExampleSet, length: int, pad_id: int, seed: int) -> None:
        self.domain, self.sequence_length = examples.name, length
        self.identity = {"example file": examples.fingerprint, "seed": str(seed)}
        self._pairs, self._pad_id, self._seed = examples.train, pad_id, seed
        self._kept: tuple[int, np.ndarray] | None = None  # an epoch and its order

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pair `index` (0, 1, 2 … without end): tokens [2, S + 1], mask [2, S], padding [2, S]; see `packed_row`."""
        epoch, index_in_epoch = divmod(index, len(self._pairs))
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, permutation(key64(self._seed, "examples", self.domain, epoch), len(self._pairs))
        return pair_rows(self._pairs[self._kept[1][index_in_epoch]], self.sequence_length, self._pad_id)


def pair_rows(pair: Sequence[TokenSequence], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair's tokens [2, S + 1], mask [2, S], padding [2, S]."""
    rows = [packed_row([sequence], length, pad_id) for sequence in pair]
    return tuple(np.stack(parts) for parts in zip(*rows, strict=True))


class NoExamples:
    """The stream of a domain without examples, whose weight is 0: nothing is ever drawn from it."""

    def __init__(self, domain: str, length: int) -> None:
        self.domain, self.sequence_length, self.identity = domain, length, {}


class ExampleSampler(MixtureSampler):
    """Draws examples by domain weight; a sample is a packed row, or the two rows of a pair."""

    def _read(self, domain: np.ndarray, index: np.ndarray, sample: np.ndarray) -> Batch:
        read = [self._streams[d].sample(int(i)) for d, i in zip(domain, index, strict=True)]
        tokens, mask, padding = (np.concatenate(parts) for parts in zip(*read, strict=True))
        rows = len(tokens) // len(domain)
        return Batch(tokens, domain.repeat(rows), sample.repeat(rows), self._step, mask, padding)


class HeldoutExamples:
    """Held-out rows of one domain, as the evaluator reads held-out text: `tokens` labels that count in all of them."""

    def __init__(self, examples: ExampleSet, length: int, pad_id: int) -> None:
        sequences = [answers[0] for answers in examples.heldout]
        starts = pack_in_order(np.array([len(sequence.ids) for sequence in sequences], np.int64), length + 1)
        self.sequence_length, self._pad_id = length, pad_id
        self._rows = [sequences[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        self.tokens = int(sum(self.sequence(row)[1].sum() for row in range(len(self))))

    def __len__(self) -> int:
        return len(self._rows)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Row int32 [S + 1] and the mask float32 [S] of its labels."""
        return packed_row(self._rows[index], self.sequence_length, self._pad_id)[:2]

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `start` … as int32 [count, S + 1] and masks float32 [count, S]; beyond the end all padding, mask 0."""
        tokens = np.full((count, self.sequence_length + 1), self._pad_id, np.int32)
        masks = np.zeros((count, self.sequence_length), np.float32)
        for row in range(min(count, len(self) - start)):
            tokens[row], masks[row] = self.sequence(start + row)
        return tokens, masks


class HeldoutPairs:
    """Held-out pairs of one domain."""

    def __init__(self, examples: ExampleSet, length: int, pad_id: int) -> None:
        self.sequence_length, self._pairs, self._pad_id = length, examples.heldout, pad_id

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs `start` … as rows int32 [2 count, S + 1] and masks float32 [2 count, S], the chosen answer's first;
        beyond the end all padding, mask 0.
        """
        tokens = np.full((2 * count, self.sequence_length + 1), self._pad_id, np.int32)
        masks = np.zeros((2 * count, self.sequence_length), np.float32)
        for pair in range(min(count, len(self) - start)):
            rows = slice(2 * pair, 2 * pair + 2)
            tokens[rows], masks[rows], _ = pair_rows(self._pairs[start + pair], self.sequence_length, self._pad_id)
        return tokens, masks


def sampler_of(
    sets: Mapping[str, ExampleSet],
    domains: Sequence[str],
    objective: str,
    length: int,
    pad_id: int,
    weights: Weights | Mapping[str, float],
    seed: int,
    max_domains_per_batch: int | None,
) -> ExampleSampler:
    """The sampler over all of the model's domains, in their order; those without examples are never drawn."""
    stream = {"sft": PackedExamples, "dpo": PairedExamples}[objective]
    streams = [
        stream(sets[name], length, pad_id, seed) if name in sets else NoExamples(name, length) for name in domains
    ]
    return ExampleSampler(streams, weights, seed, max_domains_per_batch)
