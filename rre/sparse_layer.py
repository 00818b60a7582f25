"""Sparse (mixture-of-experts) feed-forward layer: route, dispatch, exchange, experts, exchange, combine.

Legend: T tokens, D hidden width, E experts, K choices per token (top-k), R = T K rows (one per choice), B samples.
"""

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
    """Sparse (mixture-of-experts) feed-forward: x_TD -> (y_TD, auxiliary loss, rows [B, E + 1]).

    Rows are a learned gate's: tokens of each sample that each expert took and, last, that found no room. `routing` is
    what the layer's router takes from outside the graph (for a table router its whole plan), `weights` the tensors of N
    experts of `spec` as the expert store fetched them. A dropped token's y is zero: it passes through the residual
    connection only. `expert_choice`: the router's experts choose tokens. `shared_expert`: a network x_TD -> y_TD that
    every token takes with weight 1 beside its routed experts. In an SPMD graph experts have a fixed capacity, and
    `chunks` divides them, so that one chunk's AllToAll can overlap another's products. `exchange`: expert parallelism
    over processes; plans and weights are then those of the local experts, for the rows of all ranks of the
    expert-parallel group. `experts`: a cell x_TD, plan, weights -> y_RD in place of the one that suits training here.
    """

    def __init__(
        self,
        router: nn.Cell,
        layout: Layout,
        spec: FeedForwardSpec,
        compute: ms.dtype,
        exchange: LocalExchange | None = None,
        expert_choice: bool = False,
        shared_expert: nn.Cell | None = None,
        chunks: int = 1,
        experts: nn.Cell | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.is_expert_choice = expert_choice
        self.has_shared_expert = shared_expert is not None
        if shared_expert is not None:
            self.shared_expert = shared_expert
        self.exchange = exchange or LocalExchange()
        self.has_kernels = bool(layout.kernels)
        if experts is not None:
            self.experts = experts
        elif layout.spmd_mesh:
            self.experts = CapacityExperts(layout, spec, compute, layout.spmd_mesh, chunks)
        elif self.has_kernels:
            self.experts = CompiledExperts(layout.kernels, spec)
        elif layout.grouped:
            self.experts = GroupedExperts(layout, spec, compute)
        else:
            self.experts = RaggedExperts(layout, spec, compute)
        if self.has_kernels:
            self.combine = CompiledCombine(layout.kernels)
        self.is_spmd = layout.spmd_mesh is not None
        self.mul = layout(ops.Mul(), ("rows", 1), ("rows", 1))
        self.choice_sum = layout(ops.ReduceSum(), ("rows", 1, 1))
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.scatter_add = layout(ops.UnsortedSegmentSum(), (1, 1), (1,))
        self.add = layout(ops.Add(), layout.residual_spec, layout.residual_spec)

    def construct(
        self, x_TD: Tensor, routing: tuple[Tensor, ...], weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        # 1. Route: which expert each choice goes to, with which weight, and where its row stands. A table router did so
        # on the host; a learned gate does it here.
        plan, combine_weights, auxiliary, rows_BE = self.router(x_TD, routing)
        y_TD = self.apply_experts(x_TD, plan, combine_weights, weights)
        if self.has_shared_expert:
            y_TD = self.add(y_TD, self.shared_expert(x_TD))
        return y_TD, auxiliary, rows_BE

    def apply_experts(self, x_TD: Tensor, plan: tuple[Tensor, ...], combine_weights, weights: tuple[Tensor, ...]):
        """The routed experts' outputs y_TD, summed over a token's choices with `combine_weights` (None: 1 each)."""
        tokens, hidden = x_TD.shape
        if self.is_expert_choice:
            # The plan begins with the token of every row that an expert took.
            rows_RD = self.take(x_TD, plan[0], 0)
            y_RD = self.compute_experts(rows_RD, plan[1:], weights)
            y_RD = self.mul(y_RD, ops.BroadcastTo(y_RD.shape)(combine_weights.reshape(-1, 1)))
            return self.scatter_add(y_RD, plan[0], tokens)
        y_RD = self.compute_experts(x_TD, plan, weights)
        # 6. Combine: weigh each choice's result and add up those of a token.
        if combine_weights is not None and self.has_kernels:
            return self.combine(y_RD, combine_weights)
        if combine_weights is not None and self.is_spmd:
            y_RD = self.mul(y_RD, combine_weights.reshape(-1, 1))
        elif combine_weights is not None:
            y_RD = self.mul(y_RD, ops.BroadcastTo(y_RD.shape)(combine_weights.reshape(-1, 1)))
        if y_RD.shape[0] > tokens:
            y_RD = self.choice_sum(y_RD.reshape(tokens, -1, hidden), 1)
        return y_RD

    def compute_experts(self, x_TD: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        """The experts' outputs y_RD, one row per choice, on the process that the tokens came from."""
        # 3. Exchange to experts: the tokens of all ranks of the expert-parallel group.
        gathered_TD = self.exchange.to_experts(x_TD)
        # 2. Dispatch rows to slots and 4. the experts' networks, rows back in the order of choices. In an SPMD graph
        # the exchange (3 and 5) is an AllToAll inside, between dispatch and networks (`CapacityExperts`).
        y_RD = self.experts(gathered_TD, plan, weights)
        # 5. Exchange back: each process keeps the results of its own tokens.
        return self.exchange.to_tokens(y_RD)
