"""The network's forward pass, written once for training, prompts, decoding and MINDIR.

Data flow: word + position embedding -> blocks -> backbone norm -> query layer -> head. What differs between its uses
are parts that are given: the layers' attention cores (with or without a cache) and experts, and the head.

Legend: B samples, S positions, T = B*S rows, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, nn

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.dropout import CountedDropout
from pangu_sigma.model.layers.embedding import NextPositionQueries, WordEmbedding
from pangu_sigma.model.layers.mixture_head import MixtureHead, MixtureLayer, MixtureNorm
from pangu_sigma.model.layers.transformer_layer import TransformerLayer, shared_expert
from pangu_sigma.tensor_names import block_index
from parallel.operator_layout import Layout
from rre.every_expert_layer import EveryExpertFeedForward
from rre.routers import Router
from rre.sparse_layer import SparseFeedForward


class Embedding(nn.Cell):
    """Input embeddings: words, positions and the query layer's queries; their parameters are called word, position and
    query."""

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__()
        self.words = WordEmbedding(model, vocab, layout)
        self.positions = model.position_spec.build(model, layout)
        if model.has_query_layer:
            self.queries = NextPositionQueries(model, layout)

    def construct(self, tokens: Tensor, positions: Tensor, domain: Tensor | None, table) -> Tensor:
        return self.positions(self.words(tokens, domain, table), positions)


class Backbone(nn.Cell):
    """The network of these `layers`, from bottom to top, each a `TransformerLayer` or called as one, the last the query
    layer where there is one; `head` makes losses or logits of what `through_layers` gives.

    That is h_TD or, under a top layer that is a competitive mixture, the pair that `layers.mixture_head` describes.
    """

    def __init__(
        self, model: ModelConfig, vocab: int, layout: Layout, layers: Sequence[nn.Cell], head: nn.Cell
    ) -> None:
        super().__init__(auto_prefix=False)
        self.layers = model.layers
        self.embedding = Embedding(model, vocab, layout)
        self.embedding_dropout = CountedDropout(model.dropout, -1, "embedding")
        sparse_indices = {layer_name: index for index, layer_name in enumerate(model.sparse_prefixes)}
        self.sparse_index_of = tuple(sparse_indices.get(layer_name, -1) for layer_name in model.layer_names)
        self.blocks = nn.CellList(layers[: model.blocks], auto_prefix=False)
        self.norm = model.norm_spec.build(model, layout)
        self.has_query_layer = model.has_query_layer
        if self.has_query_layer:
            self.query_layer = layers[-1]
        elif model.is_competitive_mixture:
            self.norm = MixtureNorm(self.norm)
        self.head = head

    def through_layers(
        self, h: Tensor, positions: Tensor, context: tuple, caches: tuple, keys: Tensor, sparse_inputs: tuple
    ):
        """Embedded rows h_TD, position ids [T] -> (rows for the head, new keys and values of all layers, sum of the
        sparse layers' auxiliary losses, their kept rows where a gate is learned).

        `context`: for every layer's attention core, before its two of `caches`, keys and values of all layers, where
        there are any; `keys` int32 [B]: of dropout; `sparse_inputs`: (routing, weights) of each sparse layer.
        """
        h = self.embedding_dropout(h, keys)
        cos_sin = self.embedding.positions.cos_sin(positions)
        kept, auxiliary, counts = (), Tensor(0.0, ms.float32), ()
        for i, block in enumerate(self.blocks):
            routing, weights = self.inputs_of(sparse_inputs, i)
            of_layer = context + caches[2 * i : 2 * i + 2]
            h, cached, loss, rows = block(h, None, cos_sin, of_layer, keys, routing, weights)
            kept = kept + cached
            if rows is not None:
                auxiliary, counts = auxiliary + loss, counts + (rows,)
        h = self.norm(h)
        if self.has_query_layer:
            queries = self.embedding.queries(positions)
            routing, weights = self.inputs_of(sparse_inputs, self.layers - 1)
            h, cached, loss, rows = self.query_layer(h, queries, cos_sin, context + caches[-2:], keys, routing, weights)
            kept = kept + cached
            if rows is not None:
                auxiliary, counts = auxiliary + loss, counts + (rows,)
        return h, kept, auxiliary, counts

    def layer(self, layer_name: str) -> nn.Cell:
        """The layer of this name."""
        index = block_index(layer_name)
        return self.query_layer if index is None else self.blocks[index]

    def inputs_of(self, sparse_inputs: tuple, layer: int):
        """(routing, weights) of a layer by its number; both empty for a dense one."""
        index = self.sparse_index_of[layer]
        return ((), ()) if index < 0 else sparse_inputs[index]


def transformer_layers(
    model: ModelConfig, layout: Layout, compute: ms.dtype, sparse: Sequence[nn.Cell],
    cores: Sequence[nn.Cell] | None = None,
) -> list[nn.Cell]:  # fmt: skip
    """All layers from bottom to top: `sparse` are the feed-forward parts of the sparse ones, `cores` what stands
    between the projections of each layer's attention, by default training's."""
    sparse_parts = dict(zip(model.sparse_prefixes, sparse, strict=True))
    sparse_form = MixtureLayer if model.is_competitive_mixture else TransformerLayer
    return [
        (sparse_form if layer_name in sparse_parts else TransformerLayer)(
            model, index, layout, compute, sparse_parts.get(layer_name), cores[index] if cores else None
        )
        for index, layer_name in enumerate(model.layer_names)
    ]


def sparse_feed_forward(
    model: ModelConfig, router: Router, layout: Layout, compute: ms.dtype, chunks: int = 1,
    experts: nn.Cell | None = None,
) -> SparseFeedForward:  # fmt: skip
    """The feed-forward part of a sparse layer (see `SparseFeedForward`)."""
    form = EveryExpertFeedForward if model.is_competitive_mixture else SparseFeedForward
    return form(
        router.cell(), layout, model.expert_network, compute, router.options.exchange, model.router_spec.experts_choose,
        shared_expert(model, layout, compute), chunks, experts,
    )  # fmt: skip


def output_head(model: ModelConfig, vocab: int, layout: Layout, experts: int) -> nn.Cell:
    """The head of the configuration; of a competitive mixture of so many `experts`, for each of them."""
    head = model.head_spec.build(model, vocab, layout)
    return MixtureHead(head, experts, layout) if model.is_competitive_mixture else head
