"""PanGu-Sigma: PanGu-alpha's backbone whose top layers are sparse, in MindSpore cells.

Data flow: word + position embedding -> blocks -> backbone norm -> query layer -> tied head. Expert weights are inputs
(`flat`), because they live in an expert store; everything else is a parameter.

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary, N expert slots of a sparse layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from pangu_sigma.config.model import ModelConfig
from pangu_sigma.model.attention import CausalMask
from pangu_sigma.model.block import TransformerLayer
from pangu_sigma.model.dropout import CountedDropout
from pangu_sigma.model.parts import NORMS
from pangu_sigma.model.signature import FlatSignature
from parallel.layout import Layout
from parallel.primitives import EmbeddingLookup, TiedCrossEntropy
from rre.layer import SparseFeedForward
from rre.routers import Router


class Embedding(nn.Cell):
    """The tables below and above the backbone: word [V, D], position [P, D], next-position query [P, D]."""

    def __init__(self, model: ModelConfig, vocab: int, layout: Layout) -> None:
        super().__init__()
        normal = Normal(model.init_std)
        if model.embedding_slots == "shared":
            self.word = Parameter(initializer(normal, (vocab, model.hidden), ms.float32), name="word")
        self.position = Parameter(initializer(normal, (model.positions, model.hidden), ms.float32), name="position")
        if model.query_layer == "next_position":
            self.query = Parameter(initializer(normal, (model.positions, model.hidden), ms.float32), name="query")
        self.lookup = EmbeddingLookup(layout)

    def construct(self, table: Tensor, ids: Tensor) -> Tensor:
        return self.lookup(table, ids)


class PanGuSigma(nn.Cell):
    """tokens, positions, segments int32 [B, S], domain int32 [B], dropout keys int32 [B], flat -> (h_TD, aux, counts).

    `aux` is the sum of the sparse layers' auxiliary losses, `counts` the rows per expert of each sparse layer with a
    learned gate. `flat` follows `FlatSignature`.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab: int,
        routers: Sequence[Router],
        signature: FlatSignature,
        layout: Layout,
        compute: ms.dtype = ms.float32,
    ) -> None:
        super().__init__()
        self.bounds = signature.bounds
        self.vocab = vocab
        self.slots = model.embedding_slots == "per_domain"
        self.embedding = Embedding(model, vocab, layout)
        self.embedding_dropout = CountedDropout(model.dropout, -1, "embedding")
        self.mask = CausalMask(model.heads)
        places = {place: index for index, place in enumerate(model.sparse_prefixes)}
        self.place_of_block = tuple(places.get(f"blocks.{i}", -1) for i in range(model.blocks))
        self.place_of_query = places.get("query_layer", -1)

        def layer(index: int, place: int) -> TransformerLayer:
            sparse = None
            if place >= 0:
                sparse = SparseFeedForward(routers[place].cell(), layout, model.activation, compute)
            return TransformerLayer(model, index, layout, compute, sparse)

        self.blocks = nn.CellList([layer(i, self.place_of_block[i]) for i in range(model.blocks)])
        self.norm = NORMS[model.norm](model.hidden, model.norm_epsilon, layout)
        self.has_query_layer = model.query_layer == "next_position"
        if self.has_query_layer:
            self.query_layer = layer(model.blocks, self.place_of_query)
        for parameter in self.trainable_params():
            # In a checkpoint a gate belongs to its layer, not to the feed-forward part that holds its cell.
            parameter.name = parameter.name.replace(".feed_forward.router.", ".router.")

    def construct(
        self, tokens: Tensor, positions: Tensor, segments: Tensor, domain: Tensor, keys: Tensor, bounds: tuple,
        *flat: Tensor,
    ):  # fmt: skip
        batch, length = tokens.shape
        masks = ops.stop_gradient(self.mask(segments))
        flat_positions = positions.reshape(-1)
        if self.slots:
            ids = (tokens + domain.reshape(-1, 1) * self.vocab).reshape(-1)
            words = self.embedding(flat[0].reshape(-1, flat[0].shape[-1]), ids)
        else:
            words = self.embedding(self.embedding.word, tokens.reshape(-1))
        h = words + self.embedding(self.embedding.position, flat_positions)
        h = self.embedding_dropout(h, keys)
        auxiliary = Tensor(0.0, ms.float32)
        counts = ()
        for i, block in enumerate(self.blocks):
            place = self.place_of_block[i]
            routing, weights = self.inputs_of(flat, bounds, place)
            h, extra, rows = block(h, None, masks, keys, routing, weights)
            if place >= 0:
                auxiliary = auxiliary + extra
                counts = counts + (rows,)
        h = self.norm(h)
        if self.has_query_layer:
            queries = self.embedding(self.embedding.query, flat_positions)
            routing, weights = self.inputs_of(flat, bounds, self.place_of_query)
            h, extra, rows = self.query_layer(h, queries, masks, keys, routing, weights)
            if self.place_of_query >= 0:
                auxiliary = auxiliary + extra
                counts = counts + (rows,)
        return h, auxiliary, counts

    def inputs_of(self, flat: tuple[Tensor, ...], bounds: tuple, place: int):
        if place < 0:
            return (), ()
        a, b, c = bounds[place]
        return flat[a:b], flat[b:c]


class TrainingLoss(nn.Cell):
    """The objective of one micro-batch: sum over tokens of weight * loss, plus `auxiliary_weight` * auxiliary loss.

    labels int32 [B, S], weights float32 [B, S] (mask / tokens of the step * loss scale). Returns (objective, loss sums
    per sample [B] over tokens of positive weight, auxiliary loss, rows per expert).
    """

    def __init__(self, net: PanGuSigma, layout: Layout, signature: FlatSignature | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.bounds = net.bounds if signature is None else signature.bounds
        self.head = Head(net, layout)
        self.sum = layout(ops.ReduceSum(), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))

    def construct(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor,
        auxiliary_weight: Tensor,
        positions: Tensor,
        segments: Tensor,
        domain: Tensor,
        keys: Tensor,
        *flat: Tensor,
    ):
        h, auxiliary, counts = self.net(tokens, positions, segments, domain, keys, self.bounds, *flat)
        losses = self.head(h, labels, domain, flat)
        objective = self.sum(self.mul(losses, weights)) + auxiliary * auxiliary_weight
        mask = ops.cast(ops.greater(weights, 0.0), ms.float32)
        by_sample = self.sum(self.mul(ops.stop_gradient(losses), mask), 1)
        return objective, by_sample, ops.stop_gradient(auxiliary), counts


class Head(nn.Cell):
    """h_TD, labels [B, S] -> token losses [B, S], with the word embedding as output matrix (tied, no bias)."""

    def __init__(self, net: PanGuSigma, layout: Layout) -> None:
        super().__init__(auto_prefix=False)
        self.embedding = net.embedding
        self.slots = net.slots
        self.cross_entropy = TiedCrossEntropy(layout)
        self.concat = layout(ops.Concat(0))

    def construct(self, h: Tensor, labels: Tensor, domain: Tensor, flat: tuple[Tensor, ...]) -> Tensor:
        batch, length = labels.shape
        if not self.slots:
            losses, _ = self.cross_entropy(h, self.embedding.word, labels.reshape(-1))
            return losses.reshape(batch, length)
        by_sample = ()
        for b in range(batch):
            table = ops.gather(flat[0], domain[b], 0)
            losses, _ = self.cross_entropy(h[b * length : (b + 1) * length], table, labels[b])
            by_sample = by_sample + (losses.reshape(1, length),)
        return self.concat(by_sample)


class Logits(nn.Cell):
    """tokens, positions, segments [B, S], domain, keys [B], flat -> logits float32 [B, S, V]."""

    def __init__(self, net: PanGuSigma, layout: Layout, signature: FlatSignature | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.bounds = net.bounds if signature is None else signature.bounds
        self.embedding = net.embedding
        self.slots = net.slots
        self.product = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.concat = layout(ops.Concat(0))

    def construct(
        self, tokens: Tensor, positions: Tensor, segments: Tensor, domain: Tensor, keys: Tensor, *flat: Tensor
    ):
        batch, length = tokens.shape
        h, _, _ = self.net(tokens, positions, segments, domain, keys, self.bounds, *flat)
        if not self.slots:
            return self.product(h, self.embedding.word).reshape(batch, length, -1)
        parts = ()
        for b in range(batch):
            part = self.product(h[b * length : (b + 1) * length], ops.gather(flat[0], domain[b], 0))
            parts = parts + (part.reshape(1, length, -1),)
        return self.concat(parts)
