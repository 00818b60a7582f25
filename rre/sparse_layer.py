"""The sparse layer: router -> dispatch -> experts -> combine, with the exchange at its two points."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.comm.exchange import LocalExchange
from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledCombine
from rre.dispatch.capacity_dispatch import CapacityExperts
from rre.experts import CompiledExperts, RaggedExperts
from rre.feed_forward_spec import FeedForwardSpec
from rre.grouped_experts import GroupedExperts


class SparseFeedForward(nn.Cell):
    """x_TD -> (y_TD, auxiliary loss, rows); the feed-forward part of a sparse layer.

    `routing` is what the router of this layer takes from outside the graph (for table routers its whole plan) and
    `weights` the tensors of N networks of `form` that the expert store fetched. A dropped token's y is zero: it takes
    the residual alone. `by_expert`: the router's experts choose tokens. `shared_expert`: a network x_TD -> y_TD beside
    the routed ones, which every token takes with weight 1. Under a mesh's layout rows go by capacity, in `chunks` of
    the experts. `exchange`: where other processes hold other experts; plans and weights are then of the rows that come
    here and of the experts that are held here.
    """

    def __init__(
        self,
        router: nn.Cell,
        layout: Layout,
        form: FeedForwardSpec,
        compute: ms.dtype,
        exchange: LocalExchange | None = None,
        by_expert: bool = False,
        shared_expert: nn.Cell | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        self.router = router
        self.by_expert = by_expert
        self.has_shared_expert = shared_expert is not None
        if shared_expert is not None:
            self.shared_expert = shared_expert
        self.exchange = exchange or LocalExchange()
        self.has_kernels = bool(layout.kernels)
        if layout.spmd_mesh:
            self.experts = CapacityExperts(layout, form, compute, layout.spmd_mesh, chunks)
        elif self.has_kernels:
            self.experts = CompiledExperts(layout.kernels, form)
        elif layout.grouped:
            self.experts = GroupedExperts(layout, form, compute)
        else:
            self.experts = RaggedExperts(layout, form, compute)
        if self.has_kernels:
            self.weigh = CompiledCombine(layout.kernels)
        self.is_cut = layout.spmd_mesh is not None
        self.mul = layout(ops.Mul(), ("rows", 1), ("rows", 1))
        self.choice_sum = layout(ops.ReduceSum(), ("rows", 1, 1))
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.add_up = layout(ops.UnsortedSegmentSum(), (1, 1), (1,))
        self.add = layout(ops.Add(), layout.residual_spec, layout.residual_spec)

    def construct(
        self, x: Tensor, routing: tuple[Tensor, ...], weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, combine_weights, auxiliary, counts = self.router(x, routing)
        y = self.routed(x, plan, combine_weights, weights)
        if self.has_shared_expert:
            y = self.add(y, self.shared_expert(x))
        return y, auxiliary, counts

    def routed(self, x: Tensor, plan: tuple[Tensor, ...], combine_weights, weights: tuple[Tensor, ...]) -> Tensor:
        """What the chosen experts give, added up for each token by its combine weights (None: each counts once)."""
        if self.by_expert:
            y = self.compute_experts(self.take(x, plan[0], 0), plan[1:], weights)
            y = self.mul(y, ops.BroadcastTo(y.shape)(combine_weights.reshape(-1, 1)))
            return self.add_up(y, plan[0], x.shape[0])
        y = self.compute_experts(x, plan, weights)
        if combine_weights is not None and self.has_kernels:
            return self.weigh(y, combine_weights)
        if combine_weights is not None and self.is_cut:
            y = self.mul(y, combine_weights.reshape(-1, 1))
        elif combine_weights is not None:
            y = self.mul(y, ops.BroadcastTo(y.shape)(combine_weights.reshape(-1, 1)))
        tokens, hidden = x.shape
        if y.shape[0] > tokens:
            y = self.choice_sum(y.reshape(tokens, -1, hidden), 1)
        return y

    def compute_experts(self, x: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        """The networks on all rows that come here, and what they give back where the rows came from."""
        return self.exchange.to_tokens(self.experts(self.exchange.to_experts(x), plan, weights))
