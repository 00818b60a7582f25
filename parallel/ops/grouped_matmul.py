"""Grouped matrix product: one product for many experts: every run of rows with a weight of its own.

Ascend has an operator for it (grouped matmul), which needs no shape that depends on the routing. MindSpore's
semi-auto-parallel pass is not asked to cut it: under capacity every run is equally long, and a batched product of equal
runs is the same computation.

Legend: R rows, N runs of them, K and M inner and outer width.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import GroupedMatmul

from parallel.operator_layout import Layout


class NativeGroupedProduct(nn.Cell):
    """Grouped matrix product by the device's operator: rows [R, K], weights [N, K, M], ends int64 [N] -> [R, M].

    Rows up to `ends[0]` by the first weight, and so on. What comes out behind the last end is not defined.
    """

    def __init__(self) -> None:
        super().__init__()
        # A single tensor of rows and a single result, cut along the rows.
        self.product = GroupedMatmul(split_item=3, group_type=0)

    def construct(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return self.product([rows], [weights], None, None, None, None, None, ends)[0]


class ComposedGroupedProduct(nn.Cell):
    """Grouped matrix product composed of plain operators, with 0 behind the
    last end: N products over all rows, for devices that lack the operator to be compared with one that has it.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.product = layout(ops.MatMul())
        self.mul = layout(ops.Mul())
        self.cast = layout(ops.Cast())

    def construct(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        index = Tensor(np.arange(rows.shape[0], dtype=np.int64))
        result, start = 0.0, 0
        for i in range(weights.shape[0]):
            inside = ops.logical_and(index >= start, index < ends[i])
            expert_rows = self.mul(rows, self.cast(inside, rows.dtype).reshape(-1, 1))
            result = result + self.product(expert_rows, weights[i])
            start = ends[i]
        return result


def grouped_product(layout: Layout) -> nn.Cell:
    """The product in the device's form."""
    return NativeGroupedProduct() if layout.device == "Ascend" else ComposedGroupedProduct(layout)


def uses_grouped_product(device: str, compute: ms.dtype) -> bool:
    """Whether the device has the operator for this type."""
    return device == "Ascend" and compute in (ms.float16, ms.bfloat16)
