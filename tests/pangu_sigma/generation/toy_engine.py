"""An engine whose model is a function of NumPy: the logits after a token follow from its document and domain alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pangu_sigma.config import Config, config_from_dict
from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.generation.decoder import Decoder, Turns
from pangu_sigma.generation.engine import Engine

NAMES = ("code", "law", "poems")
EOD = 2


class ToyDecoder(Decoder):
    """Reads documents in blocks of `block` tokens and counts them in `blocks`."""

    def __init__(self, vocab: int, slots: int = 4, window: int = 32, block: int = 8) -> None:
        self.vocab, self.slots, self.window, self.block = vocab, slots, window, block
        self.blocks = 0
        self._texts: dict[int, tuple[list[int], int]] = {}

    def logits(self, document: Sequence[int], domain: int) -> np.ndarray:
        """Logits float32 [V] after a document."""
        assert 0 < len(document) <= self.window
        seed = zlib.crc32(np.array([domain, *document], np.int32).tobytes())
        return np.random.default_rng(seed).normal(0.0, 3.0, self.vocab).astype(np.float32)

    def score_blocks(self, ids: Sequence[int], domain: int) -> Iterator[np.ndarray]:
        """A block after the other."""
        for start in range(0, len(ids), self.block):
            self.blocks += 1
            places = range(start, min(start + self.block, len(ids)))
            yield np.stack([self.logits(ids[: place + 1], domain) for place in places])

    def begin_blocks(self, slot: int, ids: Sequence[int], domain: int) -> Turns[np.ndarray]:
        """A turn for each block but the last."""
        for start in range(0, len(ids), self.block):
            self.blocks += 1
            if start + self.block < len(ids):
                yield
        self._texts[slot] = list(ids), domain
        return self.logits(ids, domain)

    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        """The next token of some texts."""
        rows = {}
        for slot, token in tokens.items():
            document, domain = self._texts[slot]
            if document[-1] == EOD:
                document.clear()
            document.append(token)
            rows[slot] = self.logits(document, domain)
        return rows

    def end(self, slot: int) -> None:
        """Forget the text."""
        self._texts.pop(slot, None)

    def warm_ups(self, scores: bool) -> list[Callable[[], None]]:
        """Nothing is compiled."""
        return []


@dataclass
class _Groups:
    names: tuple[str, ...] = NAMES


@dataclass
class _Model:
    vocab: int
    config: Config
    groups: _Groups


def toy_engine(tokenizer: Tokenizer, vocab: int, slots: int = 4) -> Engine:
    """The engine of a `ToyDecoder`, which is its `decoder`."""
    config = config_from_dict(
        {
            "schema_version": 2,
            "run": {"dir": "run"},
            "model": {"layers": 2, "hidden": 16, "heads": 2, "ffn": 24, "positions": 32},
            "data": {"sequence_length": 32, "tokenizer": {"kind": "train", "vocab_size": vocab}},
            "domains": [{"name": name, "data": [f"{name}.jsonl"], "experts": 1} for name in NAMES],
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": 1, "batch_size": 1},
        },
        source="the test",
    )
    return Engine(_Model(vocab, config, _Groups()), tokenizer, decoder=ToyDecoder(vocab, slots))
