"""Unmixed experts: a sparse layer's networks on every token, whose outputs are handed on one by one.

Legend: T tokens, D hidden width, E experts of the layer.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from rre.sparse_layer import SparseFeedForward


class RepeatRows(nn.Cell):
    """x_TD, shape (n * T, D) -> x n times, one copy after the other, [n * T, D]."""

    def construct(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        tokens, hidden = x.shape
        return ops.BroadcastTo((shape[0] // tokens, tokens, hidden))(x).reshape(shape)


class RowsByExpert(nn.Cell):
    """y [T * E, D], experts of a token together -> [E * T, D], tokens of an expert together."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.transpose = layout(ops.Transpose(), (1, 1, 1))

    def construct(self, y: Tensor, tokens: int) -> Tensor:
        hidden = y.shape[1]
        return self.transpose(y.reshape(tokens, -1, hidden), (1, 0, 2)).reshape(-1, hidden)


class EveryExpertFeedForward(SparseFeedForward):
    """x_TD -> ((y [E * T, D], the router's weights [T, E]), auxiliary loss, rows): every expert's output by itself,
    nothing is added up.

    Its router is `rre.routers.every_expert`'s. A shared expert's output is added to every expert's. Arguments, exchange
    and kernels are those of `SparseFeedForward`.
    """

    def __init__(self, router: nn.Cell, layout: Layout, *arguments, **options) -> None:
        super().__init__(router, layout, *arguments, **options)
        self.by_expert_rows = RowsByExpert(layout)
        self.repeat_rows = RepeatRows()

    def construct(
        self, x: Tensor, routing: tuple[Tensor, ...], weights: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        plan, weights_TE, auxiliary, counts = self.router(x, routing)
        y = self.by_expert_rows(self.compute_experts(x, plan, weights), x.shape[0])
        if self.has_shared_expert:
            y = self.add(y, self.repeat_rows(self.shared_expert(x), y.shape))
        return (y, weights_TE), auxiliary, counts
