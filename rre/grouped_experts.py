"""Grouped GEMM experts: all experts of a layer as one grouped matrix product each for their two or three matrices.

Rows lie expert by expert, and no shape depends on the routing.

Legend: T tokens, K choices per token (top-k), R = T K rows (one per choice), N slots, D hidden width, F feed-forward
width, I and O width of a product's input and output.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.grouped_matmul import grouped_product
from parallel.ops.primitives import activation
from rre.feed_forward_spec import FeedForwardSpec


class GroupedExperts(nn.Cell):
    """Grouped GEMM experts: x_TD, plan (order [R], offsets [N + 1]), tensors of N experts -> y_RD.

    A dropped choice's row is 0. The plan is that of compiled experts (`dispatch_plan.DispatchPlan`). Products run in
    `compute` precision.
    """

    def __init__(self, layout: Layout, spec: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.spec, self.compute = spec, compute
        self.each = len(spec.tensors)
        self.product = grouped_product(layout)
        self.activation = activation(spec.activation, layout)
        self.take = layout(ops.Gather())
        self.stack = layout(ops.Stack(0))
        self.cast = layout(ops.Cast())
        self.select = layout(ops.Select())
        self.mul = layout(ops.Mul())
        self.add = layout(ops.Add())
        self.count = layout(ops.ReduceSum())
        self.scatter = layout(ops.TensorScatterUpdate())

    def construct(self, x_TD: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        order_R, offsets_N1 = plan
        choices = order_R.shape[0]
        tokens_R = order_R if choices == x_TD.shape[0] else order_R // (choices // x_TD.shape[0])
        index_R, ends_N = Tensor(np.arange(choices, dtype=np.int32)), offsets_N1[1:]
        kept_R1 = (index_R < offsets_N1[offsets_N1.shape[0] - 1]).reshape(-1, 1)
        # The slot of every row; a dropped one counts to the last and is masked.
        passed_RN = self.cast(index_R.reshape(-1, 1) >= ends_N.reshape(1, -1), ms.float32)
        slot_R = self.cast(ops.minimum(self.count(passed_RN, 1), float(ends_N.shape[0] - 1)), ms.int32)
        ends_N = self.cast(ends_N, ms.int64)

        stacked = ()
        for tensor in range(self.each):
            stacked = stacked + (self.stack(weights[tensor :: self.each]),)
        rows_RD = self.of_kept(kept_R1, self.cast(self.take(x_TD, tokens_R, 0), self.compute))
        if self.spec.gated:
            gate_RF = self.activation(self.through(rows_RD, stacked[0], ends_N, kept_R1))[0]
            inner_RF = self.mul(gate_RF, self.through(rows_RD, stacked[1], ends_N, kept_R1))
            y_RD = self.through(inner_RF, stacked[2], ends_N, kept_R1)
        elif self.spec.biases:
            inner_RF = self.add(self.through(rows_RD, stacked[0], ends_N, kept_R1), self.take(stacked[1], slot_R, 0))
            y_RD = self.through(self.activation(inner_RF)[0], stacked[2], ends_N, kept_R1)
            y_RD = self.of_kept(kept_R1, self.add(y_RD, self.take(stacked[3], slot_R, 0)))
        else:
            inner_RF = self.activation(self.through(rows_RD, stacked[0], ends_N, kept_R1))[0]
            y_RD = self.through(inner_RF, stacked[1], ends_N, kept_R1)
        position_R = self.scatter(index_R, order_R.reshape(-1, 1), index_R)
        return self.take(y_RD, position_R, 0)

    def through(self, rows_RI: Tensor, weights_NIO: Tensor, ends_N: Tensor, kept_R1: Tensor) -> Tensor:
        """Multiply each row with its slot's matrix, in float32. What the operator leaves behind the last end, here and
        in its gradient, is set to 0 before anyone computes with it."""
        rows_RI = self.of_kept(kept_R1, self.cast(rows_RI, self.compute))
        y_RO = self.product(rows_RI, self.cast(weights_NIO, self.compute), ends_N)
        return self.cast(self.of_kept(kept_R1, y_RO), ms.float32)

    def of_kept(self, kept_R1: Tensor, rows_RI: Tensor) -> Tensor:
        """Mask dropped rows with 0."""
        return self.select(ops.BroadcastTo(rows_RI.shape)(kept_R1), rows_RI, ops.zeros_like(rows_RI))
