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
from pangu_sigma.model.layers.feed_forward import feed_forward
from pangu_sigma.model.layers.linear_and_norm import NORMS
from parallel.operator_layout import Layout


def shared_expert(model: ModelConfig, layout: Layout, compute: ms.dtype) -> nn.Cell | None:
    """The shared expert of a sparse layer, which every token takes beside its routed ones; None without one."""
    if not model.sparse.shared_expert:
        return None
    return feed_forward(model, model.expert_network, layout, compute)


class TransformerLayer(nn.Cell):
    """Pre-norm transformer layer: h_TD -> (h_TD, auxiliary loss, kept rows), h + Attn(LN1 h), then h + FFN(LN2 h).

    In the query layer the attention's queries are rows of the next-position table, without norm (`query_rows`).
    """

    def __init__(
        self, model: ModelConfig, layer: int, layout: Layout, compute: ms.dtype, sparse: nn.Cell | None
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[model.norm](model.hidden, model.norm_epsilon, layout)
        self.attention = Attention(model, layer, layout, compute)
        self.norm2 = NORMS[model.norm](model.hidden, model.norm_epsilon, layout)
        self.is_sparse = sparse is not None
        self.feed_forward = sparse or feed_forward(model, model.network, layout, compute)
        self.attention_dropout = CountedDropout(model.dropout, layer, "attention")
        self.feed_forward_dropout = CountedDropout(model.dropout, layer, "feed-forward")
        self.add = layout(ops.Add(), layout.residual_spec, layout.residual_spec)

    def construct(
        self, h: Tensor, query_rows, masks: tuple, cos_sin: tuple, keys: Tensor, routing: tuple, weights: tuple
    ):  # fmt: skip
        h = self.attend(h, query_rows, masks, cos_sin, keys)
        x = self.norm2(h)
        if self.is_sparse:
            y, auxiliary, counts = self.feed_forward(x, routing, weights)
            return self.add(h, self.feed_forward_dropout(y, keys)), auxiliary, counts
        return self.add(h, self.feed_forward_dropout(self.feed_forward(x), keys)), None, None

    def attend(self, h: Tensor, query_rows, masks: tuple, cos_sin: tuple, keys: Tensor) -> Tensor:
        """The attention sublayer: h + Attn(LN1 h)."""
        x = self.norm1(h)
        queries = x if query_rows is None else query_rows
        return self.add(h, self.attention_dropout(self.attention(queries, x, masks, cos_sin, keys), keys))
