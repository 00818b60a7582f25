"""A decoder without a cache: logits of the whole window for every token. The cached decoder is held against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pangu_sigma.generation.decoder import Decoder, Turns
from pangu_sigma.model.model import Model
from pangu_sigma.model.scoring import Scorer


class RecomputingDecoder(Decoder):
    """The evaluation graph as a decoder: exact row blocks, one text at a time, whatever the text holds before."""

    def __init__(self, model: Model, slots: int = 8) -> None:
        self.model = model
        self.slots = slots
        self.scorer = Scorer(model, 1)
        self.window = self.scorer.length
        self._texts: dict[int, tuple[list[int], int]] = {}

    def score(self, ids: Sequence[int], domain: int) -> np.ndarray:
        """Logits float32 [n, V] after each of `ids` [n]; the last `window` of a longer text count."""
        ids = list(ids)[-self.window :]
        tokens = np.full((1, self.window + 1), self.model.eod_id, np.int32)
        tokens[0, : len(ids)] = ids
        return self.scorer.logits(tokens, [domain]).asnumpy()[0, : len(ids)]

    def score_blocks(self, ids: Sequence[int], domain: int) -> Iterator[np.ndarray]:
        """All of `score` in one turn."""
        yield self.score(ids, domain)

    def begin_blocks(self, slot: int, ids: Sequence[int], domain: int) -> Turns[np.ndarray]:
        """Logits float32 [V] after `ids`, with which the slot's new text begins."""
        self._texts[slot] = (list(ids), domain)
        return self.score(ids, domain)[-1]
        yield  # a generator without turns

    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        """slot -> logits float32 [V] after the token that is appended to it."""
        found = {}
        for slot, token in tokens.items():
            ids, domain = self._texts[slot]
            ids.append(token)
            found[slot] = self.score(ids, domain)[-1]
        return found

    def warm_ups(self, scores: bool) -> list[Callable[[], None]]:
        """The one graph there is."""
        return [lambda: self.score([self.model.eod_id], 0)]

    def end(self, slot: int) -> None:
        """The slot's text is over."""
        self._texts.pop(slot, None)
