"""All experts of a layer as one grouped product: rows lie expert by expert, and no shape depends on the routing.

Legend: T tokens, k choices of a token, R = T k rows, N slots, D hidden width, F inner width.
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
    """x_TD, plan (order [R], offsets [N + 1]), N networks -> y [R, D] by choice, 0 for a dropped one.

    The plan is that of compiled networks (`dispatch_plan.DispatchPlan`). Products run in `compute` precision.
    """

    def __init__(self, layout: Layout, form: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.form, self.compute = form, compute
        self.each = len(form.tensors)
        self.product = grouped_product(layout)
        self.activation = activation(form.activation, layout)
        self.take = layout(ops.Gather())
        self.stack = layout(ops.Stack(0))
        self.cast = layout(ops.Cast())
        self.select = layout(ops.Select())
        self.mul = layout(ops.Mul())
        self.add = layout(ops.Add())
        self.count = layout(ops.ReduceSum())
        self.scatter = layout(ops.TensorScatterUpdate())

    def construct(self, x: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        order, offsets = plan
        choices = order.shape[0]
        tokens = order if choices == x.shape[0] else order // (choices // x.shape[0])
        index, ends = Tensor(np.arange(choices, dtype=np.int32)), offsets[1:]
        kept = (index < offsets[offsets.shape[0] - 1]).reshape(-1, 1)
        # The slot of every row; a dropped one counts to the last and is masked.
        behind = self.cast(index.reshape(-1, 1) >= ends.reshape(1, -1), ms.float32)
        slot = self.cast(ops.minimum(self.count(behind, 1), float(ends.shape[0] - 1)), ms.int32)
        ends = self.cast(ends, ms.int64)

        stacked = ()
        for tensor in range(self.each):
            stacked = stacked + (self.stack(weights[tensor :: self.each]),)
        rows = self.of_kept(kept, self.cast(self.take(x, tokens, 0), self.compute))
        if self.form.gated:
            gate = self.activation(self.through(rows, stacked[0], ends, kept))[0]
            y = self.through(self.mul(gate, self.through(rows, stacked[1], ends, kept)), stacked[2], ends, kept)
        elif self.form.biases:
            inner = self.add(self.through(rows, stacked[0], ends, kept), self.take(stacked[1], slot, 0))
            y = self.through(self.activation(inner)[0], stacked[2], ends, kept)
            y = self.of_kept(kept, self.add(y, self.take(stacked[3], slot, 0)))
        else:
            inner = self.activation(self.through(rows, stacked[0], ends, kept))[0]
            y = self.through(inner, stacked[1], ends, kept)
        position = self.scatter(index, order.reshape(-1, 1), index)
        return self.take(y, position, 0)

    def through(self, rows: Tensor, weights: Tensor, ends: Tensor, kept: Tensor) -> Tensor:
        """The product in float32. What the operator leaves behind the last end, here and in its gradient, is put to 0
        before anyone computes with it."""
        rows = self.of_kept(kept, self.cast(rows, self.compute))
        y = self.product(rows, self.cast(weights, self.compute), ends)
        return self.cast(self.of_kept(kept, y), ms.float32)

    def of_kept(self, kept: Tensor, rows: Tensor) -> Tensor:
        """`rows` with 0 in place of dropped ones."""
        return self.select(ops.BroadcastTo(rows.shape)(kept), rows, ops.zeros_like(rows))
