"""The batch of one decoding step and its caches: in shared memory that the host writes, or on the device.

A batch holds `rows` texts with caches of `length` positions. Texts come in with `join`, out with `read` and `part` when
they move to a batch of another size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.generation.compiled_decode_step import CompiledStepGraph, has_compiled_step
from pangu_sigma.generation.decode_graphs import (
    EmbedGraph,
    JoinGraph,
    StepGraph,
    StoredStepGraph,
    cache_precision,
)
from pangu_sigma.model.model import Model


class Batch:
    """What both kinds have in common; `flat` is what `StoredStepGraph` says."""

    def __init__(self, model: Model, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.heads = model.config.model.heads
        self.width = model.config.model.hidden // self.heads

    def step(self, tokens: np.ndarray, positions: np.ndarray, moving: Sequence[int], flat: list[Tensor]) -> np.ndarray:
        """Logits float32 [rows, V] after tokens int32 [rows] at positions [rows].

        The rows `moving` take the token into their caches; the others' results and caches mean nothing new.
        """
        raise NotImplementedError

    def join(self, row: int, cache: Iterable[np.ndarray]) -> None:
        """Put one text's cache, keys and values [H, n, W] of every layer, into a row."""
        raise NotImplementedError

    def clear(self, row: int) -> None:
        """The row's text begins anew."""

    def read(self) -> list[np.ndarray]:
        """Keys and values [rows * H, length, W] of every layer."""
        raise NotImplementedError

    def part(self, cache: Sequence[np.ndarray], row: int, held: int) -> list[np.ndarray]:
        """One row's first `held` positions of what `read` gave."""
        return [whole[row * self.heads : (row + 1) * self.heads, :held] for whole in cache]


class SharedBatch(Batch):
    """Caches in the host's memory, which a CPU's graph reads where it lies."""

    def __init__(self, model: Model, rows: int, length: int) -> None:
        super().__init__(model, rows, length)
        dtype = ms.dtype_to_nptype(cache_precision(model))
        shape = (rows * self.heads, length, self.width)
        self._arrays = [np.zeros(shape, dtype) for _ in range(2 * model.config.model.layers)]
        self._tensors = [Tensor.from_numpy(array) for array in self._arrays]
        self._graph = CompiledStepGraph(model, rows) if has_compiled_step(model) else StepGraph(model, rows, length)

    def step(self, tokens: np.ndarray, positions: np.ndarray, moving: Sequence[int], flat: list[Tensor]) -> np.ndarray:
        logits, *new = self._graph(Tensor(tokens), Tensor(positions), *self._tensors, *flat)
        # Reading the logits waits for the whole step, so nobody reads the caches while they are written.
        logits = logits.asnumpy()
        moving = np.asarray(moving)
        at = positions[moving]
        for array, rows in zip(self._arrays, new, strict=True):
            by_row = rows.asnumpy().reshape(self.rows, self.heads, self.width)
            array.reshape(self.rows, self.heads, self.length, self.width)[moving, :, at] = by_row[moving]
        return logits

    def join(self, row: int, cache: Iterable[np.ndarray]) -> None:
        for array, part in zip(self._arrays, cache, strict=True):
            mine = array[row * self.heads : (row + 1) * self.heads]
            mine[:, : part.shape[1]] = part
            mine[:, part.shape[1] :] = 0

    def clear(self, row: int) -> None:
        for array in self._arrays:
            array[row * self.heads : (row + 1) * self.heads] = 0

    def read(self) -> list[np.ndarray]:
        return self._arrays


class DeviceBatch(Batch):
    """Caches as parameters of the graph, which stay on the device and are written there."""

    def __init__(self, model: Model, rows: int, length: int) -> None:
        super().__init__(model, rows, length)
        self._graph = StoredStepGraph(model, rows, length)
        self._tables = self._graph.body.tables
        self._embed = EmbedGraph(model, self._tables)
        self._join = JoinGraph(model, self._graph)

    def step(self, tokens: np.ndarray, positions: np.ndarray, moving: Sequence[int], flat: list[Tensor]) -> np.ndarray:
        # A row that does not move computes its last token again: the same keys and values in the same place.
        words = self._embed(Tensor(tokens), *flat[: self._tables])
        return self._graph(words, Tensor(positions), *flat).asnumpy()

    def join(self, row: int, cache: Iterable[np.ndarray]) -> None:
        new = []
        for part in cache:
            whole = np.zeros((self.heads, self.length, self.width), part.dtype)
            whole[:, : part.shape[1]] = part
            new.append(Tensor(whole))
        heads = np.arange(row * self.heads, (row + 1) * self.heads, dtype=np.int32)
        self._join(Tensor(heads), *new).asnumpy()

    def read(self) -> list[np.ndarray]:
        return [cache.asnumpy() for cache in self._join.caches]
