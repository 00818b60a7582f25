"""Compiled graphs of generation: prefill of a prompt, decode step of a batch, write of a text's cache into a batch.

Prefill and decode step are the network (`inference_network`) with other attention cores and experts.

Legend: B rows of the batch (one token of one text each), C positions of a prompt, L positions that a cache holds,
H heads, W head width, D hidden width, V vocabulary, N expert slots.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from pangu_sigma.generation.fused_decode import FusedDecodeHead, FusedDecodeLayer, has_fused_decode
from pangu_sigma.generation.inference_network import InferenceNetwork, inference_inputs, inference_layers
from pangu_sigma.generation.kv_cache_attention import (
    BlockMask,
    CacheMask,
    ParameterCacheAttention,
    PositionOneHot,
    PromptAttention,
    ReadOnlyCacheAttention,
    causal_mask,
)
from pangu_sigma.model.build_model import COMPUTE_TYPES
from pangu_sigma.model.graph_inputs import GraphInputs, placeholders
from pangu_sigma.model.model import Model
from rre.experts import ExpertPerRow, RaggedExperts


class PrefillGraph(InferenceNetwork):
    """Prefill of a block of one document: tokens int32 [C], last int32 [1], flat -> (logits, then keys and values
    [H, C, W] of every layer).

    Logits are float32 [1, V] after token number `last`, or with `every` [C, V] after each. Where there are `cached`
    positions of earlier blocks, inputs between `last` and `flat` are the block's positions int32 [C] and the caches,
    keys and values [H, cached, W] of every layer, which are seen up to the block's begin. Flat inputs of a sparse
    layer: for a table router the row numbers of N slots (dynamic length) and of the dropped, positions [C, 1] and the
    tensors of N networks; for a learned gate those of E.
    """

    def __init__(self, model: Model, length: int, every: bool, cached: int = 0) -> None:
        config, layout = model.config.model, model.layout.for_few_rows()
        slots = model.groups.total if model.learned else min(length, model.reachable_experts(domains=1))
        compute, precision = COMPUTE_TYPES[model.config.train.precision], cache_precision(model)
        cores = [PromptAttention(config, layout, precision) for _ in range(config.layers)]
        layers = inference_layers(model, cores, lambda: RaggedExperts(layout, config.expert_network, compute))
        inputs = inference_inputs(model, 1, length, slots, planned=not model.learned)
        super().__init__(model, layers, inputs)
        self.every = every
        self.cached = cached
        self.causal = Tensor(causal_mask(config.heads, length))
        own_inputs = [Tensor(shape=[length], dtype=ms.int32), Tensor(shape=[1], dtype=ms.int32)]
        if cached:
            self.mask = BlockMask(config.heads, length, cached, layout)
            cache = [config.heads, cached, config.hidden // config.heads]
            own_inputs.append(Tensor(shape=[length], dtype=ms.int32))
            own_inputs += [Tensor(shape=cache, dtype=precision) for _ in range(2 * config.layers)]
        else:
            self.positions = Tensor(np.arange(length, dtype=np.int32))
        self.set_inputs(*own_inputs, *placeholders(inputs.variable_specs()))

    def construct(self, tokens: Tensor, last: Tensor, *inputs: Tensor):
        if self.cached:
            positions, caches, flat = inputs[0], inputs[1 : 1 + 2 * self.layers], inputs[1 + 2 * self.layers :]
            mask = self.mask(positions, self.causal)
        else:
            positions, caches, flat = self.positions, (), inputs
            mask = self.causal
        h = self.embedding(tokens.reshape(1, -1), positions, None, self.word_table(flat))
        logits, kept = self.outputs(h, positions, None if self.every else last, (mask,), caches, flat)
        return (logits, *kept)


class WordLookupGraph(nn.Cell):
    """Word lookup: tokens int32 [B], then the word tables where they are inputs -> the words' rows [B, D].

    Before `DeviceDecodeStepGraph` it runs as a graph of its own: one that writes to parameters would copy the word
    table each time it is read, for the embedding and for the head.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(auto_prefix=False)
        self.words = model.net.embedding.words

    def construct(self, tokens: Tensor, *tables: Tensor) -> Tensor:
        return self.words(tokens.reshape(-1, 1), None, tables if self.words.per_domain else self.words.word)


class DeviceDecodeStepGraph(InferenceNetwork):
    """Decode step with caches on the device: words float32 [B, D] (of `WordLookupGraph`), positions int32 [B], flat ->
    logits [B, V].

    Keys and values go into the caches, which are parameters of this graph, [B*H, L, W] for every layer; a row sees its
    cache up to its position. Flat inputs of a sparse layer: the tensors of each row's expert, or for a learned
    gate those of all E.
    """

    def __init__(self, model: Model, rows: int, length: int) -> None:
        config, layout = model.config.model, model.layout
        cores = [
            ParameterCacheAttention(config, rows, length, layout, cache_precision(model)) for _ in range(config.layers)
        ]
        super().__init__(model, step_layers(model, rows, cores), step_inputs(model, rows))
        self.caches = ParameterTuple(parameter for core in cores for parameter in (core.keys, core.values))
        self.mask = CacheMask(rows, config.heads, length, layout)
        self.heads = Tensor(np.arange(rows * config.heads, dtype=np.int32).reshape(-1, 1))
        self.spread = layout(ops.BroadcastTo((rows, config.heads)), (1, 1))
        self.beside = layout(ops.Concat(1))

    def construct(self, words: Tensor, positions: Tensor, *flat: Tensor):
        indices = self.beside((self.heads, self.spread(positions.reshape(-1, 1)).reshape(-1, 1)))
        h, context = self.embedding.positions(words, positions), (indices, self.mask(positions))
        return self.outputs(h, positions, None, context, (), flat)[0]


class DecodeStepGraph(InferenceNetwork):
    """Decode step with caches as inputs: tokens, positions int32 [B], keys and values [B*H, L, W] of every layer, flat
    -> (logits float32 [B, V], the rows' new keys and values layer after layer [2 * layers * B*H, 1, W]).

    A row sees its cache before its position, from where on it must be 0. Flat inputs are those of
    `DeviceDecodeStepGraph`. Layers and head are fused where kernels cover them.
    """

    def __init__(self, model: Model, rows: int, length: int) -> None:
        config, layout = model.config.model, model.layout
        is_fused = has_fused_decode(model)
        if is_fused:
            layers = [FusedDecodeLayer(model, layer_name) for layer_name in config.layer_names]
            head = FusedDecodeHead(layout.kernels)
        else:
            precision = cache_precision(model)
            cores = [ReadOnlyCacheAttention(config, rows, layout, precision) for _ in range(config.layers)]
            layers, head = step_layers(model, rows, cores), None
        super().__init__(model, layers, step_inputs(model, rows), head)
        self.is_fused = is_fused
        # Every output that the host reads costs as much as a small layer.
        self.join = layout(ops.Concat(0))
        if not is_fused:
            self.mask = CacheMask(rows, config.heads, length, layout)
            self.one_hot = PositionOneHot(rows, config.heads, length, layout)

    def construct(self, tokens: Tensor, positions: Tensor, *inputs: Tensor):
        caches, flat = inputs[: 2 * self.layers], inputs[2 * self.layers :]
        h = self.embedding(tokens.reshape(-1, 1), positions, None, self.word_table(flat))
        context = (positions,) if self.is_fused else (self.one_hot(positions), self.mask(positions))
        logits, kept = self.outputs(h, positions, None, context, caches, flat)
        return logits, self.join(kept)


class CacheWriteGraph(nn.Cell):
    """Write of one text's caches into a row of a `DeviceDecodeStepGraph`: heads int32 [H] (row * H …), then keys and
    values [H, L, W] of every layer."""

    def __init__(self, model: Model, step: DeviceDecodeStepGraph) -> None:
        super().__init__(auto_prefix=False)
        self.caches = step.caches
        self.write = model.layout(ops.ScatterUpdate())

    def construct(self, heads: Tensor, *new: Tensor) -> Tensor:
        done = heads
        for i, cache in enumerate(self.caches):
            # A graph that returned an updated cache would copy it; the writes are all that is asked for.
            done = ops.depend(done, self.write(cache, heads, new[i]))
        return done


def cache_precision(model: Model) -> ms.dtype:
    """Type of cached keys and values: the precision of attention's products."""
    if model.config.model.attention.composed_only:
        return ms.float32
    return COMPUTE_TYPES[model.config.train.precision]


def step_inputs(model: Model, rows: int) -> GraphInputs:
    """Variable inputs of a decode step: each sparse layer takes one expert of each row, or all of a learned gate."""
    return inference_inputs(model, rows, 1, model.groups.total if model.learned else rows)


def step_layers(model: Model, rows: int, cores: list[nn.Cell]) -> list[nn.Cell]:
    """Layers of a decode step around these cores."""
    compute, layout = COMPUTE_TYPES[model.config.train.precision], model.layout.for_few_rows()
    spec = model.config.model.expert_network
    return inference_layers(model, cores, lambda: ExpertPerRow(layout, spec, compute, rows))
