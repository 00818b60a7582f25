"""PanGu-Sigma's network: PanGu-alpha's backbone whose top layers are sparse, in MindSpore cells.

Data flow: word + position embedding -> blocks -> backbone norm -> query layer; the head follows in `forward_pass`.
Expert weights are inputs, because they live in an expert store; everything else is a parameter.

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary, N expert slots of a sparse layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.attention import attention_mask
from pangu_sigma.model.layers.dropout import CountedDropout
from pangu_sigma.model.layers.embedding import POSITIONS, QUERY_LAYERS, WordEmbedding
from pangu_sigma.model.layers.linear_and_norm import NORMS
from pangu_sigma.model.layers.mixture_head import MixtureHead, MixtureLayer, MixtureNorm
from pangu_sigma.model.layers.tied_embedding_head import HEADS
from pangu_sigma.model.layers.transformer_layer import TransformerLayer, shared_expert
from pangu_sigma.tensor_names import QUERY_LAYER, block_index, block_name, name_without_cells
from parallel.comm.exchange import GatheredExchange
from parallel.mesh import Mesh
from parallel.micro_batches import PerMicroBatchCopy
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
        self.positions = POSITIONS[model.position](model, layout)
        self.has_queries = model.query_layer in QUERY_LAYERS
        if self.has_queries:
            self.queries = QUERY_LAYERS[model.query_layer](model, layout)

    def construct(self, tokens: Tensor, positions: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        return self.positions(self.words(tokens, domain, table), positions)


class PanGuSigma(nn.Cell):
    """The network under the head: tokens, positions, segments int32 [B, S], domain int32 [B], dropout keys int32 [B],
    word tables and sparse layers' inputs -> (h_TD, aux, counts).

    `tables`: of domains that have their own, else empty; `sparse_inputs`: (routing, weights) of every sparse layer.
    `aux` is the sum of the sparse layers' auxiliary losses, `counts` the rows [B, E + 1] of each sparse layer with a
    learned gate (see `rre.routers.router.Router`). `h` is for `head` alone: under a top layer that is a competitive
    mixture it is the pair that `layers.mixture_head` describes. `exchange` and `chunks` are `SparseFeedForward`'s.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab: int,
        routers: Sequence[Router],
        layout: Layout,
        compute: ms.dtype = ms.float32,
        exchange: GatheredExchange | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        self.layers = model.layers
        self.embedding = Embedding(model, vocab, layout)
        self.embedding_dropout = CountedDropout(model.dropout, -1, "embedding")
        self.mask = attention_mask(model.heads, layout, model.attention.dropout, compute)
        sparse_indices = {layer_name: index for index, layer_name in enumerate(model.sparse_prefixes)}
        self.sparse_index_of_block = tuple(sparse_indices.get(block_name(i), -1) for i in range(model.blocks))
        self.sparse_index_of_query = sparse_indices.get(QUERY_LAYER, -1)
        # A competitive mixture's experts are all in the top layer, whose cells then carry the rows of each to the head.
        competitive = model.is_competitive_mixture
        layer_form, feed_forward_spec = TransformerLayer, SparseFeedForward
        if competitive:
            layer_form, feed_forward_spec = MixtureLayer, EveryExpertFeedForward

        def layer(index: int, sparse_index: int) -> TransformerLayer:
            if sparse_index < 0:
                return TransformerLayer(model, index, layout, compute, None)
            router = routers[sparse_index]
            sparse = feed_forward_spec(
                router.cell(), layout, model.expert_network, compute, exchange, model.router_spec.experts_choose,
                shared_expert(model, layout, compute), chunks,
            )  # fmt: skip
            return layer_form(model, index, layout, compute, sparse)

        pool = routers[0].pool() if routers else None
        self.pools = pool is not None
        if self.pools:
            self.pool = pool
        self.blocks = nn.CellList([layer(i, self.sparse_index_of_block[i]) for i in range(model.blocks)])
        self.norm = NORMS[model.norm](model.hidden, model.norm_epsilon, layout)
        self.has_query_layer = self.embedding.has_queries
        if competitive and not self.has_query_layer:
            self.norm = MixtureNorm(self.norm)
        if self.has_query_layer:
            self.query_layer = layer(model.blocks, self.sparse_index_of_query)
        self.head = HEADS[model.head](model, vocab, layout)
        self.embedding_send = None
        self.untied = model.head == "untied"
        if competitive:
            self.head = MixtureHead(self.head, routers[0].choices, layout)
        for parameter in self.trainable_params():
            parameter.name = name_without_cells(parameter.name)

    def construct(
        self, tokens: Tensor, positions: Tensor, segments: Tensor, domain: Tensor, keys: Tensor, tables: tuple,
        sparse_inputs: tuple,
    ):  # fmt: skip
        masks = ops.stop_gradient(self.mask(segments))
        flat_positions = positions.reshape(-1)
        h = self.embedding(tokens, flat_positions, domain, self.word_table(tables))
        h = self.embedding_dropout(h, keys)
        cos_sin = self.embedding.positions.cos_sin(flat_positions)
        auxiliary = Tensor(0.0, ms.float32)
        counts = ()
        for i, block in enumerate(self.blocks):
            sparse_index = self.sparse_index_of_block[i]
            routing, weights = self.inputs_of(sparse_inputs, sparse_index)
            h, layer_auxiliary, rows = block(h, None, masks, cos_sin, keys, routing, weights)
            if sparse_index >= 0:
                auxiliary = auxiliary + layer_auxiliary
                counts = counts + (rows,)
        h = self.norm(h)
        if self.has_query_layer:
            queries = self.embedding.queries(flat_positions)
            routing, weights = self.inputs_of(sparse_inputs, self.sparse_index_of_query)
            h, layer_auxiliary, rows = self.query_layer(h, queries, masks, cos_sin, keys, routing, weights)
            if self.sparse_index_of_query >= 0:
                auxiliary = auxiliary + layer_auxiliary
                counts = counts + (rows,)
        if self.pools:
            auxiliary = self.pool(auxiliary)
        return h, auxiliary, counts

    def recompute_blocks(self) -> None:
        """Activation recomputation: from now on the blocks' activations are computed again for the gradient."""
        for block in self.blocks:
            block.recompute()

    def set_stages(self, mesh: Mesh) -> None:
        """Pipeline parallelism: from now on each layer belongs to its stage of `mesh`; tables to the first, head to the
        last."""
        last = mesh.pipeline - 1
        self.embedding.pipeline_stage = 0
        for index, block in enumerate(self.blocks):
            block.pipeline_stage = mesh.stage_of(index, self.layers)
        behind = [self.norm, self.head]
        if self.has_query_layer:
            behind += [self.embedding.queries, self.query_layer]
        for cell in behind:
            cell.pipeline_stage = last

    def send_tied_embedding(self, layout: Layout) -> None:
        """Tied embedding under pipeline parallelism: from now on the first stage sends the word table to the last with
        every micro-batch."""
        self.embedding_send = PerMicroBatchCopy(layout)
        self.embedding_send.pipeline_stage = 0

    def tied_embedding(self) -> Parameter | None:
        """The word table where the head shares it with the embedding."""
        return None if self.untied or self.embedding.words.per_domain else self.embedding.words.word

    def gate(self, layer_name: str) -> nn.Cell:
        """The gate of a sparse layer."""
        index = block_index(layer_name)
        layer = self.query_layer if index is None else self.blocks[index]
        return layer.feed_forward.router

    def word_table(self, tables: tuple[Tensor, ...]):
        """The word table [V, D], or the domains' tables [domains, V, D] where each has its own."""
        return tables[0] if self.embedding.words.per_domain else self.embedding.words.word

    def output_table(self, tables: tuple[Tensor, ...], tokens: Tensor):
        """The word table where the head takes it."""
        table = self.word_table(tables)
        return table if self.embedding_send is None else self.embedding_send(table, tokens)

    def inputs_of(self, sparse_inputs: tuple, sparse_index: int):
        """(routing, weights) of a sparse layer by its number; both empty for a dense layer, number -1."""
        if sparse_index < 0:
            return (), ()
        return sparse_inputs[sparse_index]
