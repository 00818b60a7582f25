"""Packed rows: several token sequences behind each other in one row of S + 1 tokens.

Attention and positions restart after every end-of-document token, which ends each sequence, so a sequence in a packed
row is computed as if it stood alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with one answer: token ids int32 [n], of which the first `prompt` are the prompt's."""

    ids: np.ndarray
    prompt: int


def packed_row(
    sequences: Sequence[TokenSequence], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row of S = `length` inputs: tokens int32 [S + 1], mask float32 [S] of the labels that count, padding bool [S]
    of the positions without text.

    The sequences must fit. The last token of the row's text is no input of anything that counts: it is padding too.
    """
    tokens = np.full(length + 1, pad_id, np.int32)
    mask = np.zeros(length, np.float32)
    start = 0
    for sequence in sequences:
        end = start + len(sequence.ids)
        tokens[start:end] = sequence.ids
        # The label at position p is the token at p + 1.
        mask[start + sequence.prompt - 1 : end - 1] = 1.0
        start = end
    return tokens, mask, np.arange(length) >= start - 1


class HeldoutRows(ABC):
    """Held-out samples of `rows_per_sample` rows each, `len()` of them, as evaluators read them."""

    def __init__(self, sequence_length: int, pad_id: int, rows_per_sample: int = 1) -> None:
        self.sequence_length, self.pad_id, self.rows_per_sample = sequence_length, pad_id, rows_per_sample

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a sample, and the mask float32 of their labels."""

    def batch(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `start` … as int32 [count A, S + 1] and masks float32 [count A, S], A a sample's rows; beyond the end
        all padding, mask 0."""
        rows = self.rows_per_sample
        tokens = np.full((rows * count, self.sequence_length + 1), self.pad_id, np.int32)
        masks = np.zeros((rows * count, self.sequence_length), np.float32)
        for index in range(min(count, len(self) - start)):
            of_sample = slice(rows * index, rows * (index + 1))
            tokens[of_sample], masks[of_sample] = self.sequence(start + index)
        return tokens, masks


def pack_in_order(lengths: np.ndarray, room: int) -> np.ndarray:
    """Next-fit packing: the sequence that each row begins with, int64 [rows + 1] and N last, when sequences of
    `lengths` [N] are laid into rows of `room` tokens in their order.
    """
    starts, used = [0], 0
    for index, length in enumerate(lengths.tolist()):
        if used + length > room:
            starts.append(index)
            used = 0
        used += length
    return np.array([*starts, len(lengths)], np.int64)
