"""KV caches: of a prompt while it is read, and of a decode batch, the rows of one decoding step.

A batch holds `rows` texts with caches of `length` positions. `join` puts a text's cache into a row; `read` and
`row_cache` take it out when texts move to a batch of another size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.generation.decode_graphs import (
    CacheWriteGraph,
    DecodeStepGraph,
    DeviceDecodeStepGraph,
    WordLookupGraph,
    cache_precision,
)
from pangu_sigma.model.graph_inputs import GraphInputs, split_inputs
from pangu_sigma.model.model import Model
from pangu_sigma.plan.requirements import check_caches


class PromptCache:
    """Keys and values of a prompt's blocks that were read so far, in the host's memory; `length` tokens."""

    def __init__(self, model: Model, length: int = 0) -> None:
        self.length = length
        config = model.config.model
        shape = (2 * config.layers, config.heads, length, config.hidden // config.heads)
        self._cache = np.zeros(shape, ms.dtype_to_nptype(cache_precision(model)))
        self._new: list[Sequence[np.ndarray]] = []

    def append(self, block: Sequence[np.ndarray], is_last: bool) -> None:
        """Add keys and values [H, n, W] of every layer; those of a last block are only read before the next graph runs,
        which may write where they lie."""
        self._new.append(block if is_last else [part.copy() for part in block])
        self.length += block[0].shape[1]

    def tensors(self, length: int) -> list[Tensor]:
        """Keys and values [H, length, W] of every layer, 0 behind the text. Not copied: to be read before more come."""
        if self._cache.shape[2] != length:
            cache = np.zeros((*self._cache.shape[:2], length, self._cache.shape[3]), self._cache.dtype)
            cache[:, :, : self._cache.shape[2]] = self._cache
            self._cache = cache
        end = self.length
        for block in reversed(self._new):
            start = end - block[0].shape[1]
            for layer, part in zip(self._cache, block, strict=True):
                layer[:, start:end] = part
            end = start
        self._new = []
        return [Tensor.from_numpy(layer) for layer in self._cache]

    def arrays(self) -> list[np.ndarray]:
        """Keys and values [H, n, W] of every layer."""
        stored = self.length - sum(block[0].shape[1] for block in self._new)
        parts = [self._cache[:, :, :stored], *self._new] if stored else self._new
        if len(parts) == 1:
            return list(parts[0])
        return [np.concatenate(layer, axis=1) for layer in zip(*parts, strict=True)]


class DecodeBatch:
    """Base of both decode batches. Legend: H heads, W head width, V vocabulary; `flat`: see `DeviceDecodeStepGraph`."""

    def __init__(self, model: Model, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.heads = model.config.model.heads
        self.width = model.config.model.hidden // self.heads

    @property
    def graph_inputs(self) -> GraphInputs:
        """The flat inputs of a step."""
        return self._graph.graph_inputs

    def step(self, tokens: np.ndarray, positions: np.ndarray, moving: Sequence[int], flat: list[Tensor]) -> np.ndarray:
        """Logits float32 [rows, V] after tokens int32 [rows] at positions [rows].

        The rows `moving` append the token to their caches; the others keep their caches, and their logits are not read.
        """
        raise NotImplementedError

    def join(self, row: int, cache: Iterable[np.ndarray]) -> None:
        """Put one text's cache, keys and values [H, n, W] of every layer, into a row."""
        raise NotImplementedError

    def clear(self, row: int) -> None:
        """Empty the cache of a row."""

    def read(self) -> list[np.ndarray]:
        """Keys and values [rows * H, length, W] of every layer."""
        raise NotImplementedError

    def row_cache(self, caches: Sequence[np.ndarray], row: int, length: int) -> list[np.ndarray]:
        """One row's first `length` positions of the caches that `read` gave: [H, length, W] each."""
        return [cache[row * self.heads : (row + 1) * self.heads, :length] for cache in caches]


class HostDecodeBatch(DecodeBatch):
    """Decode batch with caches in the host's memory, which a CPU's graph reads without copying."""

    def __init__(self, model: Model, rows: int, length: int) -> None:
        super().__init__(model, rows, length)
        check_caches(model.config, rows, length)
        dtype = ms.dtype_to_nptype(cache_precision(model))
        self._caches = np.zeros((2 * model.config.model.layers, rows * self.heads, length, self.width), dtype)
        self._tensors = [Tensor.from_numpy(cache) for cache in self._caches]
        self._graph = DecodeStepGraph(model, rows, length)

    def step(self, tokens: np.ndarray, positions: np.ndarray, moving: Sequence[int], flat: list[Tensor]) -> np.ndarray:
        logits, new = self._graph(Tensor(tokens), Tensor(positions), *self._tensors, *flat)
        # Reading the logits waits for the whole step, so the graph no longer reads the caches when they are written.
        logits = logits.asnumpy()
        moving = np.asarray(moving)
        caches = self._caches.reshape(-1, self.rows, self.heads, self.length, self.width)
        new_by_row = new.asnumpy().reshape(-1, self.rows, self.heads, self.width).swapaxes(0, 1)
        caches[:, moving, :, positions[moving]] = new_by_row[moving]
        return logits

    def join(self, row: int, cache: Iterable[np.ndarray]) -> None:
        for row_cache, part in zip(self._row(row), cache, strict=True):
            row_cache[:, : part.shape[1]] = part
            row_cache[:, part.shape[1] :] = 0

    def clear(self, row: int) -> None:
        self._row(row)[:] = 0

    def read(self) -> list[np.ndarray]:
        return list(self._caches)

    def _row(self, row: int) -> np.ndarray:
        """A row's keys and values [2 * layers, H, length, W]."""
        return self._caches[:, row * self.heads : (row + 1) * self.heads]


class DeviceDecodeBatch(DecodeBatch):
    """Decode batch with caches as parameters of the graph, which stay on the device and are written there."""

    def __init__(self, model: Model, rows: int, length: int) -> None:
        super().__init__(model, rows, length)
        self._graph = DeviceDecodeStepGraph(model, rows, length)
        self._look_up = WordLookupGraph(model)
        self._join = CacheWriteGraph(model, self._graph)

    def step(self, tokens: np.ndarray, positions: np.ndarray, moving: Sequence[int], flat: list[Tensor]) -> np.ndarray:
        # A row that does not move computes its last token again: the same keys and values in the same place.
        words = self._look_up(Tensor(tokens), *split_inputs(tuple(flat), self.graph_inputs.bounds)[0])
        return self._graph(words, Tensor(positions), *flat).asnumpy()

    def join(self, row: int, cache: Iterable[np.ndarray]) -> None:
        new = []
        for part in cache:
            padded = np.zeros((self.heads, self.length, self.width), part.dtype)
            padded[:, : part.shape[1]] = part
            new.append(Tensor(padded))
        heads = np.arange(row * self.heads, (row + 1) * self.heads, dtype=np.int32)
        self._join(Tensor(heads), *new).asnumpy()

    def read(self) -> list[np.ndarray]:
        return [cache.asnumpy() for cache in self._join.caches]
