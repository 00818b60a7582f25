"""Transformer layer: pre-norm attention and feed-forward, dense or sparse. The query layer is one whose queries come
from the next-position table.

Legend: T rows, D hidden width.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.attention import Attention
from pangu_sigma.model.layers.dropout import CountedDropout
from parallel.operator_layout import Layout


def shared_expert(model: ModelConfig, layout: Layout, compute: ms.dtype) -> nn.Cell | None:
    """The shared expert of a sparse layer, which every token takes beside its routed ones; None without one."""
    if not model.sparse.shared_expert:
        return None
    return model.expert_kind.build(model, model.expert_network, layout, compute)


class TransformerLayer(nn.Cell):
    """Pre-norm transformer layer: h_TD -> (h_TD, new keys and values, auxiliary loss, kept rows), h + Attn(LN1 h), then
    h + FFN(LN2 h).

    `core`: what stands between attention's projections (see `Attention`), which gets the layer's `context`; None is
    training's. `sparse`: the layer's experts (`rre.sparse_layer`); without them it is dense, has neither loss nor rows,
    and ignores `routing` and `weights`. In the query layer the attention's queries are rows of the next-position table,
    without norm (`query_rows`).
    """

    def __init__(
        self, model: ModelConfig, layer: int, layout: Layout, compute: ms.dtype, sparse: nn.Cell | None,
        core: nn.Cell | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = model.norm_spec.build(model, layout)
        self.attention = Attention(model, layer, layout, compute, core)
        self.norm2 = model.norm_spec.build(model, layout)
        self.is_sparse = sparse is not None
        self.feed_forward = sparse or model.feed_forward_kind.build(model, model.network, layout, compute)
        self.attention_dropout = CountedDropout(model.dropout, layer, "attention")
        self.feed_forward_dropout = CountedDropout(model.dropout, layer, "feed-forward")
        self.add = layout(ops.Add(), layout.residual_spec, layout.residual_spec)

    def construct(
        self, h: Tensor, query_rows, cos_sin: tuple, context: tuple, keys: Tensor, routing: tuple, weights: tuple
    ):  # fmt: skip
        x = self.norm1(h)
        y, kept = self.attention(x if query_rows is None else query_rows, x, cos_sin, context, keys)
        h = self.add(h, self.attention_dropout(y, keys))
        x = self.norm2(h)
        if self.is_sparse:
            y, auxiliary, counts = self.feed_forward(x, routing, weights)
            return self.add_feed_forward(h, y, keys), kept, auxiliary, counts
        return self.add_feed_forward(h, self.feed_forward(x), keys), kept, None, None

    def add_feed_forward(self, h: Tensor, y: Tensor, keys: Tensor):
        """h + y under dropout."""
        return self.add(h, self.feed_forward_dropout(y, keys))
