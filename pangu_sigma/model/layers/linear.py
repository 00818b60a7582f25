"""Linear layer as a cell with parameters; its arithmetic is `parallel.ops.primitives`'."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer

from parallel.operator_layout import Layout
from parallel.ops.primitives import linear
from parallel.partition_spec import AxisSpec


class LinearCell(nn.Cell):
    """Linear layer: x [T, in] -> x @ weight [in, out] + bias [out] if it has `biases`; weight ~ Normal(std), bias 0.
    `cut` names the mesh's axis that cuts the weight's rows, its columns, or neither."""

    def __init__(
        self, inner: int, outer: int, layout: Layout, compute: ms.dtype, std: float, biases: bool = True,
        cut: tuple[AxisSpec, AxisSpec] = (1, 1),
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = Parameter(initializer(Normal(std), (inner, outer), ms.float32), name="weight")
        self.has_bias = biases
        if biases:
            self.bias = Parameter(initializer("zeros", (outer,), ms.float32), name="bias")
        self.linear = linear(layout, compute, biases, *cut)

    def construct(self, x: Tensor) -> Tensor:
        if self.has_bias:
            return self.linear(x, self.weight, self.bias)
        return self.linear(x, self.weight)
