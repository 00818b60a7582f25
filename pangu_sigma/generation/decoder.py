"""Interface of a model to the engine, and work that is done in turns.

Work on one text that takes long is a generator that yields after every turn: whoever drives it serves others between
two turns, and drops the rest by closing it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import numpy as np

Result = TypeVar("Result")
Turns = Generator[None, None, Result]


def in_one_go(turns: Turns[Result]) -> Result:
    """All turns of some work without anything in between."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


class Decoder(ABC):
    """Interface of the model to the engine: logits for `slots` texts, each within one document of `window` tokens.

    A document is read in blocks of a fixed number of tokens, counted from its begin. A block's numbers follow from
    the document alone: neither when it is read nor what else is computed in between changes a bit.
    """

    slots: int
    window: int

    @abstractmethod
    def score_blocks(self, ids: tuple[int, ...], domain: int) -> Iterator[np.ndarray]:
        """Logits float32 [n, V] after each token of one block of the document `ids` after the other; no slot changes.

        An array may be written over by the decoder's next call.
        """

    @abstractmethod
    def begin_blocks(self, slot: int, ids: tuple[int, ...], domain: int) -> Turns[np.ndarray]:
        """Give `slot` to a new text that begins with the document `ids`, a block a turn; logits float32 [V] after the
        last."""

    def score(self, ids: tuple[int, ...], domain: int) -> np.ndarray:
        """Logits float32 [n, V] after each of `ids` [n], all blocks in one go."""
        return np.concatenate([rows.copy() for rows in self.score_blocks(ids, domain)])

    def begin(self, slot: int, ids: tuple[int, ...], domain: int) -> np.ndarray:
        """`begin_blocks` in one go."""
        return in_one_go(self.begin_blocks(slot, ids, domain))

    @abstractmethod
    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        """Append a token to some slots (slot -> id); slot -> logits float32 [V] after it.

        A token that follows an end-of-document token begins a document. Where it raises, no text has changed.
        """

    @abstractmethod
    def end(self, slot: int) -> None:
        """Free the slot; an empty slot is no error."""

    @abstractmethod
    def warm_ups(self, scores: bool) -> list[Callable[[], None]]:
        """Calls that each compile one of the graphs that texts within the window can need, with `scores` also those of
        `score_blocks`; to be called while no slot is in use."""
