"""Examples as rows of S + 1 tokens: packed one behind the other for sft, a pair in two rows for dpo.

Attention and positions restart after every end-of-document token, which ends each example, so an example in a packed
row is computed as if it stood alone. Only labels of answers count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pangu_sigma.data.mixture_sampler import Batch, MixtureSampler
from pangu_sigma.data.packed_rows import HeldoutRows, pack_in_order, packed_row
from pangu_sigma.finetuning.examples import Answers, ExampleSet
from rre.counted_random import key64, permutation


class ExampleStream:
    """The endless samples of one domain's examples, in an order that is drawn anew for each epoch: packed rows of sft,
    the two rows of each pair of dpo."""

    def __init__(self, examples: ExampleSet, length: int, pad_id: int, seed: int) -> None:
        self.domain, self.sequence_length = examples.name, length
        self.identity = {"example file": examples.fingerprint, "seed": str(seed)}
        self._examples, self._pad_id, self._seed = examples.train, pad_id, seed
        self._first = [0]  # the first sample of every epoch that was begun so far
        self._kept: tuple[int, list[Answers], np.ndarray] | None = None  # an epoch, its examples, where samples begin

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample `index` (0, 1, 2 … without end): tokens [A, S + 1], mask [A, S], padding [A, S]; see `sample_rows`."""
        while self._first[-1] <= index:
            _, starts = self._epoch(len(self._first) - 1)
            self._first.append(self._first[-1] + len(starts) - 1)
        epoch = int(np.searchsorted(self._first, index, side="right")) - 1
        examples, starts = self._epoch(epoch)
        start, end = starts[index - self._first[epoch] :][:2]
        return sample_rows(examples[start:end], self.sequence_length, self._pad_id)

    def _epoch(self, epoch: int) -> tuple[list[Answers], np.ndarray]:
        if self._kept is None or self._kept[0] != epoch:
            order = permutation(key64(self._seed, "examples", self.domain, epoch), len(self._examples))
            examples = [self._examples[i] for i in order]
            self._kept = epoch, examples, _sample_starts(examples, self.sequence_length)
        return self._kept[1:]


def sample_rows(
    examples: Sequence[Answers], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a sample, one for each of an example's A answers, the chosen one first: tokens [A, S + 1], mask [A,
    S], padding [A, S]; see `packed_row`."""
    rows = [packed_row(sequences, length, pad_id) for sequences in zip(*examples, strict=True)]
    return tuple(np.stack(parts) for parts in zip(*rows, strict=True))


def _sample_starts(examples: Sequence[Answers], length: int) -> np.ndarray:
    """The example that each sample begins with, and N last: a pair is a sample, single answers are packed into rows."""
    if examples and len(examples[0]) > 1:
        return np.arange(len(examples) + 1)
    return pack_in_order(np.array([len(answers[0].ids) for answers in examples], np.int64), length + 1)


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


class HeldoutExamples(HeldoutRows):
    """Held-out samples of one domain, as evaluators read held-out text: `tokens` labels that count in all of them."""

    def __init__(self, examples: ExampleSet, length: int, pad_id: int) -> None:
        super().__init__(length, pad_id, rows_per_sample=len(examples.heldout[0]))
        starts = _sample_starts(examples.heldout, length)
        self._samples = [examples.heldout[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        self.tokens = int(sum(self.sequence(index)[1].sum() for index in range(len(self))))

    def __len__(self) -> int:
        return len(self._samples)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int32 [A, S + 1] of a sample and the masks float32 [A, S] of their labels."""
        return sample_rows(self._samples[index], self.sequence_length, self.pad_id)[:2]
