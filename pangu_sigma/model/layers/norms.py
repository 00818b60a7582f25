"""Normalisations (`config.parts.norm_specs`) as cells with parameters, whose arithmetic is that of
`parallel.ops.primitives`."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer

from pangu_sigma.config.model_section import ModelConfig
from parallel.operator_layout import Layout
from parallel.ops.primitives import layer_norm, rms_norm


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
