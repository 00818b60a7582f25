"""PanGu-Sigma's network as it is trained: `backbone` with the parameters of its own, and losses over it.

Expert weights are inputs, because they live in an expert store; everything else is a parameter. The head follows in
`forward_pass`.

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary, N expert slots of a sparse layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.backbone import Backbone, output_head, sparse_feed_forward, transformer_layers
from pangu_sigma.model.layers.attention import attention_mask
from pangu_sigma.tensor_names import name_without_cells
from parallel.mesh import Mesh
from parallel.micro_batches import PerMicroBatchCopy
from parallel.operator_layout import Layout
from rre.routers import Router


class PanGuSigma(Backbone):
    """The network under the head: tokens, positions, segments int32 [B, S], domain int32 [B], dropout keys int32 [B],
    word tables and sparse layers' inputs -> (h_TD, aux, counts).

    `tables`: of domains that have their own, else empty; `sparse_inputs`: (routing, weights) of every sparse layer.
    `aux` is the sum of the sparse layers' auxiliary losses, `counts` the rows [B, E + 1] of each sparse layer with a
    learned gate (see `rre.routers.router.Router`). `h` is for `head` alone. `chunks` are
    `SparseFeedForward`'s.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab: int,
        routers: Sequence[Router],
        layout: Layout,
        compute: ms.dtype = ms.float32,
        chunks: int = 1,
    ) -> None:
        sparse = [sparse_feed_forward(model, router, layout, compute, chunks) for router in routers]
        layers = transformer_layers(model, layout, compute, sparse)
        head = output_head(model, vocab, layout, routers[0].options.groups.total if model.is_mixture else 0)
        super().__init__(model, vocab, layout, layers, head)
        self.mask = attention_mask(model, layout, compute)
        self.pool = routers[0].pool() if routers else None
        self.embedding_send = None
        self.is_tied = model.head_spec.is_tied
        for name, parameter in self.parameters_and_names():
            parameter.name = name_without_cells(name)

    def construct(
        self, tokens: Tensor, positions: Tensor, segments: Tensor, domain: Tensor, keys: Tensor, tables: tuple,
        sparse_inputs: tuple,
    ):  # fmt: skip
        masks = ops.stop_gradient(self.mask(segments))
        positions = positions.reshape(-1)
        h = self.embedding(tokens, positions, domain, self.word_table(tables))
        h, _, auxiliary, counts = self.through_layers(h, positions, masks, (), keys, sparse_inputs)
        if self.pool is not None:
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
        return self.embedding.words.word if self.is_tied and not self.embedding.words.per_domain else None

    def gate(self, layer_name: str) -> nn.Cell:
        """The gate of a sparse layer."""
        return self.layer(layer_name).feed_forward.router

    def word_table(self, tables: tuple[Tensor, ...]):
        """The word table [V, D], or the domains' tables [domains, V, D] where each has its own."""
        return tables[0] if self.embedding.words.per_domain else self.embedding.words.word

    def output_table(self, tables: tuple[Tensor, ...], tokens: Tensor):
        """The word table where the head takes it."""
        table = self.word_table(tables)
        return table if self.embedding_send is None else self.embedding_send(table, tokens)

