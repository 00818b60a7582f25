"""Linear layer and normalisations as cells with parameters; their arithmetic is `parallel.ops.primitives`'."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer

from pangu_sigma.config.model_section import ModelConfig
from parallel.operator_layout import Layout
from parallel.ops.primitives import layer_norm, linear, rms_norm
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


class LayerNormCell(nn.Cell):
    """Layer normalisation of x_TD with learned gamma and beta [D], in float32."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.gamma = Parameter(initializer("ones", (model.hidden,), ms.float32), name="gamma")
        self.beta = Parameter(initializer("zeros", (model.hidden,), ms.float32), name="beta")
        self.norm = layer_norm(layout, model.norm_epsilon)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.gamma, self.beta)[0]


class RmsNormCell(nn.Cell):
    """RMSNorm: x_TD by its root mean square, with a learned gamma [D], in float32."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.gamma = Parameter(initializer("ones", (model.hidden,), ms.float32), name="gamma")
        self.norm = rms_norm(layout, model.norm_epsilon)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.gamma)[0]


def norm(model: ModelConfig, layout: Layout) -> nn.Cell:
    """The normalisation of the configuration."""
    return {"layernorm": LayerNormCell, "rmsnorm": RmsNormCell}[model.norm](model, layout)
