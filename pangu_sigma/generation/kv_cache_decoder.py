"""KV-cache decoder: prefill of a prompt, then one token a step for all texts together.

A prompt is read in blocks of `block` tokens, counted from its begin, the last one as long as what is left; each sees
those before it in their cache. A block is a graph's run of its own, and its shape follows from its place and length.

What is exact: so what a prompt gives follows from the prompt alone, whatever is computed between two of its blocks; and
the compiled kernels compute every row of a decoding step by itself. So nothing depends on what else is in the batch, to
the bit. Without
those kernels (`run.kernels`, learned gates, shared experts, other devices) the products with shared weights take all
rows of a step at once: the same rows among as many others give the same bits, while another number of rows (a power
of two, by how many texts are under way) rounds differently in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Tensor

from pangu_sigma.generation.decode_graphs import PrefillGraph, cache_precision
from pangu_sigma.generation.decoder import Decoder, Turns
from pangu_sigma.generation.kv_cache_batch import DecodeBatch, DeviceDecodeBatch, HostDecodeBatch, PromptCache
from pangu_sigma.model.graph_inputs import GraphInputs
from pangu_sigma.model.model import Model
from pangu_sigma.tensor_names import DOMAIN_EMBEDDING
from rre.dispatch.dispatch_plan import plan_present

SHORTEST_PROMPT = 16
BLOCK = 128
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


class KvCacheDecoder(Decoder):
    """Decoder with a KV cache: decodes up to `slots` texts of one model together.

    The batch grows and shrinks with the texts: rows are powers of two up to `slots`, cache positions powers of two
    times `shortest_cache` up to the window; each size is compiled when first needed (or by `warm_ups`) and kept. Expert
    weights are read from the model's store where they lie. `on_device` says where caches are kept; None takes what the
    device needs. `block`: tokens of a prompt that are read at once.
    """

    def __init__(
        self,
        model: Model,
        slots: int = 8,
        shortest_cache: int = SHORTEST_CACHE,
        on_device: bool | None = None,
        block: int = BLOCK,
    ) -> None:
        self.model = model
        self.slots = slots
        self.window = model.config.data.sequence_length
        self.block = min(block, self.window)
        self._last_block = (self.window - 1) // self.block * self.block  # where the last one of the window begins
        self._cache_lengths = buckets(shortest_cache, self.window)
        self._prefill_graphs: dict[tuple[int, int, bool], PrefillGraph] = {}
        self._batch_class = (
            DeviceDecodeBatch if (model.layout.native if on_device is None else on_device) else HostDecodeBatch
        )
        self._batches: dict[tuple[int, int], DecodeBatch] = {}
        self._batch: DecodeBatch | None = None
        self._texts: dict[int, _Sequence] = {}
        self._steps_with_room = 0

    def score_blocks(self, ids: Sequence[int], domain: int) -> Iterator[np.ndarray]:
        """Logits float32 [n, V] after each token of one block of the document `ids` after the other."""
        return self._read(ids, domain, PromptCache(self.model), every=True)

    def begin_blocks(self, slot: int, ids: Sequence[int], domain: int) -> Turns[np.ndarray]:
        """Give `slot` to a text that begins with the document `ids`, a block a turn; logits float32 [V] after the
        last."""
        self._texts.pop(slot, None)
        cache = PromptCache(self.model)
        blocks = self._read(ids, domain, cache, every=False)
        logits = next(blocks)
        while cache.length < len(ids):
            yield
            logits = next(blocks)
        text = _Sequence(len(ids), ids[-1], domain)
        texts = [*self._texts.values(), text]
        self._resize_batch(texts, max(text.length for text in texts))
        row = min(set(range(self._batch.rows)) - {other.row for other in self._texts.values()})
        self._batch.join(row, cache.arrays())
        text.row = row
        self._texts[slot] = text
        return logits[0]

    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        """Append a token to some slots (slot -> id); slot -> logits float32 [V] after it. Other slots do not change,
        and none does where it raises."""
        before = {slot: (self._texts[slot].length, self._texts[slot].last) for slot in tokens}
        try:
            return self._step(tokens)
        except Exception:
            for slot, (length, last) in before.items():
                self._texts[slot].length, self._texts[slot].last = length, last
            raise

    def _step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        moving = [self._texts[slot] for slot in tokens]
        for text, token in zip(moving, tokens.values(), strict=True):
            # Attention and positions restart after a document's end, so the cache is simply empty again.
            if text.last == self.model.eod_id:
                text.length = 0
                self._batch.clear(text.row)
            text.length += 1
            text.last = token
        # One more place for each text that stands still, see below.
        lengths = [text.length + (slot not in tokens) for slot, text in self._texts.items()]
        self._resize_batch(list(self._texts.values()), min(max(lengths), self.window))
        rows = self._batch.rows
        # Rows without a text that moves repeat the first one's inputs, so that no other weights are read. What they
        # write lies behind their text, where its next token writes anew.
        ids = np.full(rows, moving[0].last, np.int32)
        domain = np.full(rows, moving[0].domain, np.int32)
        positions = np.zeros(rows, np.int32)
        for text in self._texts.values():
            positions[text.row] = min(text.length, self._batch.length - 1)
        for text in moving:
            ids[text.row], positions[text.row], domain[text.row] = text.last, text.length - 1, text.domain
        flat = self._row_inputs(ids, domain, self._batch.graph_inputs)
        logits = self._batch.step(ids, positions, [text.row for text in moving], flat)
        return {slot: logits[text.row] for slot, text in zip(tokens, moving, strict=True)}

    def end(self, slot: int) -> None:
        """Free the slot."""
        self._texts.pop(slot, None)

    def warm_ups(self, scores: bool) -> list[Callable[[], None]]:
        """Calls that each compile, by running it, a graph that texts can need; with `scores` also those of
        `score_blocks`."""
        graphs: list[Callable[[], None]] = []
        for every in (False, True) if scores else (False,):
            for size in buckets(SHORTEST_PROMPT, self.block):
                graphs.append(partial(self._warm_up_prefill, size, 0, every))
            for cached in buckets(self.block, self._last_block) if self._last_block else ():
                graphs.append(partial(self._warm_up_prefill, self.block, cached, every))
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

    def _warm_up_prefill(self, size: int, cached: int, every: bool) -> None:
        self._prefill([self.model.eod_id] * size, 0, PromptCache(self.model, cached), every)

    def _read(self, ids: Sequence[int], domain: int, cache: PromptCache, every: bool) -> Iterator[np.ndarray]:
        """Logits after the last (or every) token of one block of `ids` after the other, each put into the cache."""
        for start in range(0, len(ids), self.block):
            block = ids[start : start + self.block]
            logits, new = self._prefill(block, domain, cache, every)
            cache.append([part[:, : len(block)] for part in new], is_last=start + len(block) == len(ids))
            yield logits

    def _prefill(
        self, ids: Sequence[int], domain: int, cache: PromptCache, every: bool
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits after the last (or every) token of a block behind what is cached, and its keys and values [H, C, W]
        of every layer."""
        start = cache.length
        cached = bucket(start, self.block, self._last_block) if start else 0
        size = self.block if start else bucket(len(ids), SHORTEST_PROMPT, self.block)
        if (size, cached, every) not in self._prefill_graphs:
            self._prefill_graphs[size, cached, every] = PrefillGraph(self.model, size, every, cached)
        graph = self._prefill_graphs[size, cached, every]
        # What stands behind the prompt is not seen by it; its keys and values are overwritten before they are seen.
        tokens = np.full(size, ids[-1], np.int32)
        tokens[: len(ids)] = ids
        last = np.array([len(ids) - 1], np.int32)
        before: list[Tensor] = []
        if cached:
            positions = np.minimum(np.arange(start, start + size, dtype=np.int32), self.window - 1)
            before = [Tensor(positions), *cache.tensors(cached)]
        flat = self._prefill_inputs(tokens, np.array([domain]), graph.graph_inputs)
        outputs = graph(Tensor(tokens), Tensor(last), *before, *flat)
        logits = outputs[0].asnumpy()
        return logits[: len(ids)] if every else logits, [part.asnumpy() for part in outputs[1:]]

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

    def _resize_batch(self, texts: list[_Sequence], length: int) -> None:
        """Make the batch large enough for `texts` of `length` tokens, and smaller after a while; texts move with their
        caches."""
        rows = bucket(len(texts), 1, self.slots)
        length = bucket(length, self._cache_lengths[0], self.window)
        current = self._batch
        if current is not None:
            roomy = rows < current.rows or length < current.length
            self._steps_with_room = self._steps_with_room + 1 if roomy else 0
            if rows <= current.rows and length <= current.length and self._steps_with_room < PATIENCE:
                return
            if self._steps_with_room < PATIENCE:
                rows, length = max(rows, current.rows), max(length, current.length)
        batch = self._batch_of_size(rows, length)
        moving = [text for text in texts if text.row >= 0]
        if moving:
            caches = current.read()
            for row, text in enumerate(moving):
                batch.join(row, current.row_cache(caches, text.row, text.length))
        for row, text in enumerate(moving):
            text.row = row
        self._batch, self._steps_with_room = batch, 0
