"""Compiled graphs of generation: prefill of a prompt, decode step of a batch, write of a text's cache into a batch.

Prefill and decode step take their variable inputs flat, in this order: where each domain has its own embedding, the
word table [V, D] of the prompt or of each row; then what each sparse layer takes, from the bottom up.

Legend: B rows of the batch (one token of one text each), C positions of a prompt, L positions that a cache holds,
H heads, W head width, D hidden width, V vocabulary, N expert slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_sigma.generation.inference_layers import (
    ExpertPerRow,
    InferenceCell,
    InferenceDenseFeedForward,
    InferenceLayer,
    PlannedExperts,
    inference_norm,
)
from pangu_sigma.generation.inference_mixture import top_layer_cells
from pangu_sigma.generation.kv_cache_attention import (
    CacheMask,
    ParameterCacheAttention,
    PositionOneHot,
    PromptAttention,
    ReadOnlyCacheAttention,
    ReturnedCacheAttention,
    causal_mask,
)
from pangu_sigma.model.build_model import COMPUTE_TYPES
from pangu_sigma.model.model import Model
from parallel.ops.rotary import RotaryCosSin


class EmbeddingGraph(InferenceCell):
    """Embedding lookup: tokens int32 [T], then the word tables where they are inputs -> the words' rows [T, D].

    Before `DeviceDecodeStepGraph` it runs as a graph of its own: one that writes to parameters would copy the word
    table each time it is read, for the embedding and for the head.
    """

    def __init__(self, model: Model, tables: int) -> None:
        super().__init__()
        layout = model.layout
        self.tables = tables
        if tables == 0:
            self.words = {parameter.name: parameter for parameter in model.net.get_parameters()}["embedding.word"]
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.split = layout(ops.Split(0, max(tables, 1)), (1,))
        self.concat = layout(ops.Concat(0))

    def construct(self, tokens: Tensor, *tables: Tensor) -> Tensor:
        if self.tables == 0:
            return self.take(self.words, tokens, 0)
        if self.tables == 1:
            return self.take(tables[0], tokens, 0)
        parts = self.split(tokens)
        rows = ()
        for i in range(self.tables):
            rows = rows + (self.take(tables[i], parts[i], 0),)
        return self.concat(rows)


class InferenceNetwork(InferenceCell):
    """Layers and head: words [T, D], positions [T] -> (logits [T, V], new keys and values of every layer).

    `cores`: the attention of each layer; `sparse`: the experts of each sparse layer. With `last` int32 [n] only those
    rows get logits.

    `sizes`: number of flat inputs of each sparse layer. `tables`: number of word tables among them, 0 for the shared
    one.
    """

    def __init__(
        self, model: Model, cores: Sequence[nn.Cell], sparse: dict[str, nn.Cell], sizes: Sequence[int], tables: int
    ) -> None:
        super().__init__()
        config, layout = model.config.model, model.layout
        compute = COMPUTE_TYPES[model.config.train.precision]
        named = {parameter.name: parameter for parameter in model.net.get_parameters()}
        prefixes = [f"blocks.{i}" for i in range(config.blocks)]
        self.has_query_layer = config.blocks < config.layers
        if self.has_query_layer:
            prefixes.append("query_layer")
            self.queries = named["embedding.query"]
        self.blocks = config.blocks
        self.tables = tables
        if tables == 0:
            self.words = named["head.word" if config.head == "untied" else "embedding.word"]
        self.rotates = config.position == "rope"
        if self.rotates:
            width = config.hidden // config.heads
            self.angles = RotaryCosSin(layout, config.positions, config.heads, width, config.rope_theta)
        else:
            self.positions = named["embedding.position"]
        backbone_norm = inference_norm(named, "norm", config, layout)
        ends = np.cumsum([tables, *sizes]).tolist()
        bounds = {prefix: (ends[i], ends[i + 1]) for i, prefix in enumerate(config.sparse_prefixes)}
        self.bounds = tuple(bounds.get(prefix, (0, 0)) for prefix in prefixes)
        top = top_layer_cells(config)
        self.layers = nn.CellList(
            [
                (top.layer if prefix in sparse else InferenceLayer)(
                    named, prefix, core,
                    sparse.get(prefix) or InferenceDenseFeedForward(
                        named, f"{prefix}.feed_forward", config.network, layout, compute
                    ),
                    config, layout, compute,
                )
                for prefix, core in zip(prefixes, cores, strict=True)
            ],
            auto_prefix=False,
        )  # fmt: skip
        if self.has_query_layer:
            self.norm = backbone_norm
        head_norm = None if self.has_query_layer else backbone_norm
        self.head = top.head(head_norm, tables, layout)
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(self, words: Tensor, positions: Tensor, last, contexts: tuple, flat: tuple[Tensor, ...]):
        h, cos_sin = words, ()
        if self.rotates:
            cos_sin = self.angles(positions)
        else:
            h = self.add(words, self.take(self.positions, positions, 0))
        kept = ()
        for i, layer in enumerate(self.layers):
            query_rows = None
            if self.has_query_layer and i == self.blocks:
                h = self.norm(h)
                query_rows = self.take(self.queries, positions, 0)
            start, end = self.bounds[i]
            h, cached = layer(h, query_rows, cos_sin, contexts[i], flat[start:end])
            kept = kept + cached
        tables = (self.words,) if self.tables == 0 else flat[: self.tables]
        return self.head(h, last, tables), kept


class PrefillGraph(InferenceCell):
    """Prefill of one document: tokens int32 [C], last int32 [1], flat -> (logits, then keys and values [H, C, W] of
    every layer).

    Logits are float32 [1, V] after token number `last`, or with `every` [C, V] after each. Flat inputs of a sparse
    layer: for a table router the row numbers of N slots (dynamic length) and of the dropped, positions [C, 1] and the
    tensors of N networks; for a learned gate those of E.
    """

    def __init__(self, model: Model, length: int, every: bool) -> None:
        super().__init__()
        config, layout = model.config.model, model.layout
        self.length, self.every = length, every
        self.slots = min(length, model.reachable_experts(domains=1)) if not model.learned else model.groups.total
        sparse, size = _sparse(model, PlannedExperts, self.slots)
        if not model.learned:
            size += self.slots + 2
        width = config.hidden // config.heads
        cores = [PromptAttention(config.heads, width, layout, cache_precision(model)) for _ in range(config.layers)]
        self.embed = EmbeddingGraph(model, int(own_tables(model)))
        self.body = InferenceNetwork(model, cores, sparse, [size] * len(sparse), tables=int(own_tables(model)))
        self.mask = Tensor(causal_mask(config.heads, length))
        self.positions = Tensor(np.arange(length, dtype=np.int32))
        self.set_inputs(*self.placeholders(model))

    def placeholders(self, model: Model) -> list[Tensor]:
        """Inputs of unknown content for compiling."""
        config = model.config.model
        inputs = [Tensor(shape=[self.length], dtype=ms.int32), Tensor(shape=[1], dtype=ms.int32)]
        if own_tables(model):
            inputs.append(Tensor(shape=[model.vocab, config.hidden], dtype=ms.float32))
        for _ in config.sparse_prefixes:
            if not model.learned:
                inputs += [Tensor(shape=[None], dtype=ms.int32) for _ in range(self.slots + 1)]
                inputs.append(Tensor(shape=[self.length, 1], dtype=ms.int32))
            inputs += _weight_placeholders(model, self.slots)
        return inputs

    def construct(self, tokens: Tensor, last: Tensor, *flat: Tensor):
        contexts = ((self.mask,),) * len(self.body.bounds)
        words = self.embed(tokens, *flat[: self.body.tables])
        logits, kept = self.body(words, self.positions, None if self.every else last, contexts, flat)
        return (logits, *kept)


class DeviceDecodeStepGraph(InferenceCell):
    """Decode step with caches on the device: words float32 [B, D] (of `EmbeddingGraph`), positions int32 [B], flat ->
    logits [B, V].

    Keys and values go into the caches, which are parameters of this graph, [B*H, L, W] for every layer; a row sees its
    cache up to its position. Flat inputs of a sparse layer: the tensors of each row's expert, or for a learned
    gate those of all E.
    """

    def __init__(self, model: Model, rows: int, length: int) -> None:
        super().__init__()
        config, layout = model.config.model, model.layout
        width = config.hidden // config.heads
        self.caches = [
            ParameterCacheAttention(f"cache.{i}", rows, config.heads, length, width, layout, cache_precision(model))
            for i in range(config.layers)
        ]
        self.body = InferenceNetwork(model, self.caches, *_step_layers(model, rows))
        self.mask = CacheMask(rows, config.heads, length, layout)
        heads = np.arange(rows * config.heads, dtype=np.int32).reshape(-1, 1)
        self.heads = Tensor(heads)
        self.spread = layout(ops.BroadcastTo((rows, config.heads)), (1, 1))
        self.beside = layout(ops.Concat(1))

    def construct(self, words: Tensor, positions: Tensor, *flat: Tensor):
        indices = self.beside((self.heads, self.spread(positions.reshape(-1, 1)).reshape(-1, 1)))
        contexts = ((indices, self.mask(positions)),) * len(self.body.bounds)
        logits, _ = self.body(words, positions, None, contexts, flat)
        return logits


class DecodeStepGraph(InferenceCell):
    """Decode step with caches as inputs: tokens, positions int32 [B], keys and values [B*H, L, W] of every layer, flat
    -> (logits float32 [B, V], then the new key and value of every row, [B*H, 1, W], of every layer).

    A row sees its cache before its position, from where on it must be 0. Flat inputs are those of
    `DeviceDecodeStepGraph`. With `updated`, for export: the cache may hold anything from the position on, and the
    caches with the new rows written come back instead.
    """

    def __init__(self, model: Model, rows: int, length: int, updated: bool = False) -> None:
        super().__init__()
        config, layout = model.config.model, model.layout
        width = config.hidden // config.heads
        form = ReturnedCacheAttention if updated else ReadOnlyCacheAttention
        cores = [form(rows, config.heads, width, layout, cache_precision(model)) for _ in range(config.layers)]
        self.body = InferenceNetwork(model, cores, *_step_layers(model, rows))
        self.embed = EmbeddingGraph(model, self.body.tables)
        self.mask = CacheMask(rows, config.heads, length, layout)
        self.one_hot = PositionOneHot(rows, config.heads, length, layout)
        self.updated = updated
        self.transposed = (rows * config.heads, length, 1)

    def construct(self, tokens: Tensor, positions: Tensor, *inputs: Tensor):
        layers = len(self.body.bounds)
        flat = inputs[2 * layers :]
        one_hot, mask = self.one_hot(positions), self.mask(positions)
        if self.updated:
            one_hot = one_hot.reshape(self.transposed)
        contexts = ()
        for i in range(layers):
            contexts = contexts + ((inputs[2 * i], inputs[2 * i + 1], one_hot, mask),)
        logits, kept = self.body(self.embed(tokens, *flat[: self.body.tables]), positions, None, contexts, flat)
        return (logits, *kept)


class CacheWriteGraph(InferenceCell):
    """Write of one text's caches into a row of a `DeviceDecodeStepGraph`: heads int32 [H] (row * H …), then keys and
    values [H, L, W] of every layer."""

    def __init__(self, model: Model, step: DeviceDecodeStepGraph) -> None:
        super().__init__()
        self.caches = ParameterTuple(p for core in step.caches for p in (core.keys, core.values))
        self.write = model.layout(ops.ScatterUpdate())

    def construct(self, heads: Tensor, *new: Tensor) -> Tensor:
        done = heads
        for i, cache in enumerate(self.caches):
            # A graph that returned an updated cache would copy it; the writes are all that is asked for.
            done = ops.depend(done, self.write(cache, heads, new[i]))
        return done


def cache_precision(model: Model) -> ms.dtype:
    """Type of cached keys and values: the precision of attention's products."""
    if model.config.model.attention.dropout:
        return ms.float32
    return COMPUTE_TYPES[model.config.train.precision]


def own_tables(model: Model) -> bool:
    """Whether every domain has a word table of its own, which is then an input of the graphs."""
    return model.config.model.domain_parameters.embedding == "own"


def _sparse(model: Model, planned: type, slots: int) -> tuple[dict[str, nn.Cell], int]:
    """Cells of the sparse layers and the number of weight inputs that each takes."""
    config, layout = model.config.model, model.layout
    compute = COMPUTE_TYPES[model.config.train.precision]
    named = {parameter.name: parameter for parameter in model.net.get_parameters()}
    total = model.groups.total if model.learned else slots
    top, sparse = top_layer_cells(config), {}
    for layer_name in config.sparse_prefixes:
        if model.learned:
            cell = top.gated_experts(model.net.gate(layer_name), total, config, layout, compute)
        else:
            cell = planned(config, slots, layout, compute)
        if config.sparse.shared_expert:
            prefix = f"{layer_name}.shared_expert"
            shared = InferenceDenseFeedForward(named, prefix, config.expert_network, layout, compute)
            cell = top.with_shared_expert(cell, shared, layout)
        sparse[layer_name] = cell
    return sparse, len(config.expert_network.tensors) * total


def _step_layers(model: Model, rows: int) -> tuple[dict[str, nn.Cell], list[int], int]:
    sparse, size = _sparse(model, ExpertPerRow, rows)
    return sparse, [size] * len(sparse), rows if own_tables(model) else 0


def _weight_placeholders(model: Model, experts: int) -> list[Tensor]:
    config = model.config.model
    shapes = config.expert_network.shapes(config.hidden, config.ffn).values()
    return [Tensor(shape=list(shape), dtype=ms.float32) for _ in range(experts) for shape in shapes]
