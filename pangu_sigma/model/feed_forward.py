"""The feed-forward part of a dense layer."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from pangu_sigma.config.model import ModelConfig
from pangu_sigma.model.affine import Affine
from parallel.layout import Layout
from parallel.primitives import activation


class DenseFeedForward(nn.Cell):
    """x_TD -> y_TD: activation(x W_up + b_up) W_down + b_down, one network for every token."""

    def __init__(self, model: ModelConfig, layout: Layout, compute: ms.dtype, residual_std: float) -> None:
        super().__init__()
        self.up = Affine(model.hidden, model.ffn, layout, compute, model.init_std)
        self.down = Affine(model.ffn, model.hidden, layout, compute, residual_std)
        self.activation = activation(model.activation, layout)

    def construct(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x))[0])
