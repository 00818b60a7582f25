"""Native operators: primitives of a device whose fused operators are the fast form, with MindSpore's own gradients.

A graph that is cut over a mesh needs these: its pass places the collectives of an operator's gradient by the operator's
layout, and knows nothing of a gradient that a cell writes itself.

Legend: T rows, K and N inner and outer width, D hidden width, V vocabulary.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.partition_spec import AxisSpec


class NativeProduct(nn.Cell):
    """Linear layer without bias by the device's operator: y_TN = x_TK @ w_KN; the product runs in `compute` precision.

    `inner` and `outer` say how K and N are cut. A cut K leaves a sum over the ranks behind the product.
    """

    def __init__(self, layout: Layout, compute: ms.dtype, inner: AxisSpec = 1, outer: AxisSpec = 1) -> None:
        super().__init__()
        self.compute = compute
        summed = inner != 1
        given = ("rows", inner) if summed else layout.residual_spec
        self.result = layout.residual_spec if summed else ("rows", outer)
        self.low_x = layout(ops.Cast(), given)
        self.low_w = layout(ops.Cast(), (inner, outer))
        self.product = layout(ops.MatMul(), ("rows", inner), (inner, outer), out=self.result if summed else None)
        self.full = layout(ops.Cast(), self.result)

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        if self.compute == ms.float32:
            return self.product(x, w)
        return self.full(self.product(self.low_x(x, self.compute), self.low_w(w, self.compute)), ms.float32)


class NativeLinear(nn.Cell):
    """Linear layer by the device's operator: y_TN = x_TK @ w_KN + b_N: `NativeProduct` and a bias, which is added in
    float32.
    """

    def __init__(self, layout: Layout, compute: ms.dtype, inner: AxisSpec = 1, outer: AxisSpec = 1) -> None:
        super().__init__()
        self.product = NativeProduct(layout, compute, inner, outer)
        self.add_bias = layout(ops.Add(), self.product.result, (self.product.result[1],))

    def construct(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return self.add_bias(self.product(x, w), b)


class NativeLookup(nn.Cell):
    """Vocabulary-parallel embedding lookup by the device's operator: table_VD[ids_T]; `vocabulary` says how V is
    sharded: each rank looks up its own ids, and the rows are summed.
    """

    def __init__(self, layout: Layout, vocabulary: AxisSpec = 1) -> None:
        super().__init__()
        self.rows = layout(ops.Gather(), (vocabulary, 1), ("rows",))

    def construct(self, table: Tensor, ids: Tensor) -> Tensor:
        return self.rows(table, ids, 0)


class NativeCrossEntropy(nn.Cell):
    """Vocabulary-parallel cross-entropy. Token losses of logits_TV = h_TD @ table_VD^T against labels_T, in float32; V
    is cut over the tensor axis.

    log sum exp(l - max) - (l_label - max): no rank ever holds a whole row of logits (arXiv 1909.08053, section 3).
    Returns (loss_T,).
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        unsharded, sharded = ("rows", 1), ("rows", "tensor")
        self.logits = layout(ops.MatMul(transpose_b=True), unsharded, ("tensor", 1))
        self.largest = layout(ops.ReduceMax(keep_dims=True), sharded)
        self.below = layout(ops.Sub(), sharded, unsharded)
        self.exp = layout(ops.Exp(), sharded)
        self.sum = layout(ops.ReduceSum(keep_dims=True), sharded)
        self.log = layout(ops.Log(), unsharded)
        self.one_hot = layout(ops.OneHot(), sharded, (), ())
        self.pick = layout(ops.Mul(), sharded, sharded)
        self.minus = layout(ops.Sub(), unsharded, unsharded)
        self.reshape = ops.Reshape()
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, h: Tensor, table: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = self.logits(h, table)
        logits = self.below(logits, ops.stop_gradient(self.largest(logits, -1)))
        hits = self.one_hot(labels, table.shape[0], self.on, self.off)
        picked = self.sum(self.pick(logits, hits), -1)
        losses = self.minus(self.log(self.sum(self.exp(logits), -1)), picked)
        return (self.reshape(losses, (-1,)),)
