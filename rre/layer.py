"""The sparse layer: router -> dispatch -> experts -> combine, with the exchange at its two points."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.exchange import LocalExchange
from parallel.layout import Layout
from rre.dispatch import Combine, Dispatch
from rre.experts import Experts


class SparseFeedForward(nn.Cell):
    """x_TD -> (y_TD, auxiliary loss, kept rows); the feed-forward part of a sparse layer.

    `routing` is what the router of this layer takes from outside the graph (for table routers its whole plan) and
    `weights` the 4 N tensors that the expert store fetched. A dropped token's y is zero: it takes the residual alone.
    """

    def __init__(
        self, router: nn.Cell, layout: Layout, activation: str, compute: ms.dtype, exchange: nn.Cell | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.dispatch = Dispatch(layout)
        self.experts = Experts(layout, activation, compute)
        self.exchange = exchange or LocalExchange()
        self.combine = Combine(layout)
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.choice_sum = layout(ops.ReduceSum(), (1, 1, 1))

    def construct(
        self, x: Tensor, routing: tuple[Tensor, ...], weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, position, combine_weights, auxiliary, counts = self.router(x, routing)
        sent = self.exchange.to_experts(self.dispatch(x, rows, position))
        results = self.exchange.to_tokens(self.experts(sent, weights))
        y = self.combine(results, rows, position, x)
        if combine_weights is not None:
            y = self.mul(y, ops.BroadcastTo(y.shape)(combine_weights.reshape(-1, 1)))
        if position.shape[1] > 1:
            y = self.choice_sum(y.reshape(x.shape[0], position.shape[1], x.shape[1]), 1)
        return y, auxiliary, counts
