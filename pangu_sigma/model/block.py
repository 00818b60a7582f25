"""A transformer layer: pre-LN attention and feed-forward, dense or sparse; the query layer is one whose queries come
from the next-position table."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from pangu_sigma.model.affine import Affine
from pangu_sigma.model.attention import Attention
from pangu_sigma.model.dropout import CountedDropout
from pangu_sigma.model.parts import NORMS
from parallel.layout import Layout
from parallel.primitives import ACTIVATIONS


class DenseFeedForward(nn.Cell):
    """x_TD -> y_TD: activation(x W_up + b_up) W_down + b_down, one network for every token."""

    def __init__(
        self, hidden: int, ffn: int, activation: str, layout: Layout, compute: ms.dtype, std: float, down_std: float
    ) -> None:
        super().__init__()
        self.up = Affine(hidden, ffn, layout, compute, std)
        self.down = Affine(ffn, hidden, layout, compute, down_std)
        self.activation = ACTIVATIONS[activation](layout)

    def construct(self, x: Tensor) -> Tensor:
        inner, _, _ = self.activation(self.up(x))
        return self.down(inner)


class TransformerLayer(nn.Cell):
    """h_TD -> (h_TD, auxiliary loss, rows per expert): h + Attn(LN1 h), then h + FFN(LN2 h).

    In the query layer the attention's queries are rows of the next-position table, without norm (`query_rows`).
    """

    def __init__(self, model, layer: int, layout: Layout, compute: ms.dtype, sparse: nn.Cell | None) -> None:
        super().__init__()
        residual_std = model.init_std / (2.0 * model.layers) ** 0.5
        self.norm1 = NORMS[model.norm](model.hidden, model.norm_epsilon, layout)
        self.attention = Attention(
            model.hidden, model.heads, layout, compute, model.init_std, residual_std, model.attention.dropout, layer
        )
        self.norm2 = NORMS[model.norm](model.hidden, model.norm_epsilon, layout)
        self.is_sparse = sparse is not None
        self.feed_forward = sparse or DenseFeedForward(
            model.hidden, model.ffn, model.activation, layout, compute, model.init_std, residual_std
        )
        self.attention_dropout = CountedDropout(model.dropout, layer, "attention")
        self.feed_forward_dropout = CountedDropout(model.dropout, layer, "feed-forward")

    def construct(self, h: Tensor, query_rows, masks: tuple, keys: Tensor, routing: tuple, weights: tuple):
        x = self.norm1(h)
        queries = x if query_rows is None else query_rows
        h = h + self.attention_dropout(self.attention(queries, x, masks, keys), keys)
        x = self.norm2(h)
        if self.is_sparse:
            y, auxiliary, counts = self.feed_forward(x, routing, weights)
            return h + self.feed_forward_dropout(y, keys), auxiliary, counts
        return h + self.feed_forward_dropout(self.feed_forward(x), keys), None, None
