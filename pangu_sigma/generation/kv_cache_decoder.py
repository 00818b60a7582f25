"""KV-cache decoder: prefill of a prompt, then one token a step for all texts together.

What is exact: a prompt is computed alone in a graph whose shape follows from its own length, and the compiled kernels
compute every row of a decoding step by itself; so nothing depends on what else is in the batch, to the bit. Without
those kernels (`run.kernels`, learned gates, shared experts, other devices) the products with shared weights take all
rows of a step at once: the same rows among as many others give the same bits, while another number of rows (a power
of two, by how many texts are under way) rounds differently in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.generation.decode_graphs import PrefillGraph, cache_precision
from pangu_sigma.generation.kv_cache_batch import DecodeBatch, DeviceDecodeBatch, HostDecodeBatch
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from rre.dispatch.dispatch_plan import plan_present

SHORTEST_PROMPT = 16
SHORTEST_CACHE = 128
# A smaller batch is cheaper by far, moving into it costs about one step: it must have been enough for this many steps.
PATIENCE = 8


def bucket(needed: int, smallest: int, largest: int) -> int:
    """The first of smallest, 2 smallest, 4 smallest, … that is enough, at most `largest`."""
    return next(size for size in buckets(smallest, largest) if size >= min(needed, largest))


def buckets(smallest: int, largest: int) -> list[int]:
    """smallest, 2 smallest, 4 smallest, … below `largest`, then `largest`."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, largest]


@dataclass
class _Sequence:
    """One text being decoded: length of its last document so far, last token, domain, row in the batch."""

    length: int
    last: int
    domain: int
    row: int = -1


class KvCacheDecoder:
    """Decoder with a KV cache: decodes up to `slots` texts of one model together.

    The batch grows and shrinks with the texts: rows are powers of two up to `slots`, cache positions powers of two
    times `shortest_cache` up to the window; each size is compiled when first needed (or by `warm_ups`) and kept. Expert
    weights are read from the model's store where they lie. `on_device` says where caches are kept; None takes what the
    device needs.
    """

    def __init__(
        self, model: Model, slots: int = 8, shortest_cache: int = SHORTEST_CACHE, on_device: bool | None = None
    ) -> None:
        self.model = model
        self.slots = slots
        self.window = model.config.data.sequence_length
        self._cache_lengths = buckets(shortest_cache, self.window)
        self._prefill_graphs: dict[tuple[int, bool], PrefillGraph] = {}
        self._batch_class = (
            DeviceDecodeBatch if (model.layout.native if on_device is None else on_device) else HostDecodeBatch
        )
        self._batches: dict[tuple[int, int], DecodeBatch] = {}
        self._batch: DecodeBatch | None = None
        self._texts: dict[int, _Sequence] = {}
        self._steps_with_room = 0

    def score(self, ids: Sequence[int], domain: int) -> np.ndarray:
        """Logits float32 [n, V] after each of `ids` [n], one document of at most `window` tokens."""
        return self._prefill(ids, domain, every=True)[0]

    def begin(self, slot: int, ids: Sequence[int], domain: int) -> np.ndarray:
        """Give `slot` to a text that begins with the document `ids`; logits float32 [V] after the last."""
        self._texts.pop(slot, None)
        logits, cache = self._prefill(ids, domain, every=False)
        text = _Sequence(len(ids), ids[-1], domain)
        self._resize_batch([*self._texts.values(), text])
        text.row = min(set(range(self._batch.rows)) - {other.row for other in self._texts.values()})
        self._batch.join(text.row, [layer[:, : len(ids)] for layer in cache])
        self._texts[slot] = text
        return logits[0]

    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        """Append a token to some slots (slot -> id); slot -> logits float32 [V] after it. Other slots do not change."""
        for slot, token in tokens.items():
            text = self._texts[slot]
            # Attention and positions restart after a document's end, so the cache is simply empty again.
            if text.last == self.model.eod_id:
                text.length = 0
                self._batch.clear(text.row)
            text.length += 1
            text.last = token
        self._resize_batch(list(self._texts.values()))
        rows = self._batch.rows
        ids = np.full(rows, self.model.eod_id, np.int32)
        positions = np.zeros(rows, np.int32)
        domain = np.zeros(rows, np.int32)
        used = []
        for text in self._texts.values():
            ids[text.row], positions[text.row], domain[text.row] = text.last, text.length - 1, text.domain
            used.append(text.row)
        # Rows without a text repeat the first one's inputs, so that no other weights are read.
        free = np.setdiff1d(np.arange(rows), used)
        ids[free], domain[free] = ids[used[0]], domain[used[0]]
        moving = [self._texts[slot].row for slot in tokens]
        logits = self._batch.step(ids, positions, moving, self._row_inputs(ids, domain, self._batch.graph_inputs))
        return {slot: logits[self._texts[slot].row] for slot in tokens}

    def end(self, slot: int) -> None:
        """Free the slot."""
        self._texts.pop(slot, None)

    def warm_ups(self, scores: bool) -> list[Callable[[], None]]:
        """Calls that each compile, by running it, a graph that texts can need; with `scores` also those of `score`."""
        graphs: list[Callable[[], None]] = []
        for size in buckets(SHORTEST_PROMPT, self.window):
            for every in (False, True) if scores else (False,):
                graphs.append(partial(self._prefill, [self.model.eod_id] * size, 0, every))
        for rows in buckets(1, self.slots):
            for length in self._cache_lengths:
                graphs.append(partial(self._warm_up_batch, rows, length))
        return graphs

    def _warm_up_batch(self, rows: int, length: int) -> None:
        batch = self._batch_of_size(rows, length)
        nothing = np.zeros((batch.heads, 0, batch.width), ms.dtype_to_nptype(cache_precision(self.model)))
        batch.join(0, [nothing] * (2 * self.model.config.model.layers))
        zeros = np.zeros(rows, np.int32)
        batch.step(zeros, zeros, [0], self._row_inputs(zeros, zeros, batch.graph_inputs))

    def _batch_of_size(self, rows: int, length: int) -> DecodeBatch:
        if (rows, length) not in self._batches:
            self._batches[rows, length] = self._batch_class(self.model, rows, length)
        return self._batches[rows, length]

    def _prefill(self, ids: Sequence[int], domain: int, every: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits after the last (or every) of `ids`, and keys and values [H, C, W] of every layer."""
        size = bucket(len(ids), SHORTEST_PROMPT, self.window)
        if (size, every) not in self._prefill_graphs:
            self._prefill_graphs[size, every] = PrefillGraph(self.model, size, every)
        graph = self._prefill_graphs[size, every]
        # What stands behind the prompt is not seen by it; its keys and values are overwritten before they are seen.
        tokens = np.full(size, ids[-1], np.int32)
        tokens[: len(ids)] = ids
        last = np.array([len(ids) - 1], np.int32)
        flat = self._prefill_inputs(tokens, np.array([domain]), graph.graph_inputs)
        outputs = graph(Tensor(tokens), Tensor(last), *flat)
        logits = outputs[0].asnumpy()
        return logits[: len(ids)] if every else logits, [cache.asnumpy() for cache in outputs[1:]]

    def _prefill_inputs(self, tokens: np.ndarray, domain: np.ndarray, inputs: GraphInputs) -> list[Tensor]:
        ids = self._experts(tokens[None], domain)
        plans = [i if i is None else plan_present(i, layer.slots) for i, layer in zip(ids, inputs.layers, strict=True)]
        by_layer = list(zip(inputs.layers, plans, strict=True))
        routing = [layer.routing_arrays(plan, None) for layer, plan in by_layer]
        return self._pack(inputs, domain, routing, [layer.experts(plan) for layer, plan in by_layer])

    def _row_inputs(self, tokens: np.ndarray, domain: np.ndarray, inputs: GraphInputs) -> list[Tensor]:
        ids = self._experts(tokens[:, None], domain)
        experts = [layer.experts(None) if i is None else i[:, 0] for i, layer in zip(ids, inputs.layers, strict=True)]
        return self._pack(inputs, domain, [()] * len(experts), experts)

    def _experts(self, tokens: np.ndarray, domain: np.ndarray) -> list[np.ndarray | None]:
        """The experts [T, 1] of tokens [B, S] in each layer that a table routes, None in others."""
        samples = np.zeros(len(domain), np.int64)
        return [
            None if router.learned else router.assign(tokens, domain, 0, samples, False)
            for router in self.model.routers
        ]

    def _pack(self, inputs: GraphInputs, domain: np.ndarray, routing: list, experts: list[np.ndarray]) -> list[Tensor]:
        store = self.model.store
        tables = store.fetch(DOMAIN_EMBEDDING, domain) if inputs.word_tables else []
        return inputs.pack_flat(store, tables, routing, experts)

    def _resize_batch(self, texts: list[_Sequence]) -> None:
        """Make the batch large enough for `texts`, and smaller after a while; texts move with their caches."""
        rows = bucket(len(texts), 1, self.slots)
        length = bucket(max(text.length for text in texts), self._cache_lengths[0], self.window)
        current = self._batch
        if current is not None:
            roomy = rows < current.rows or length < current.length
            self._steps_with_room = self._steps_with_room + 1 if roomy else 0
            if rows <= current.rows and length <= current.length and self._steps_with_room < PATIENCE:
                return
            if self._steps_with_room < PATIENCE:
                rows, length = max(rows, current.rows), max(length, current.length)
        self._steps_with_room = 0
        self._batch = self._batch_of_size(rows, length)
        moving = [text for text in texts if text.row >= 0]
        if moving:
            caches = current.read()
            for row, text in enumerate(moving):
                self._batch.join(row, current.row_cache(caches, text.row, text.length))
                text.row = row
