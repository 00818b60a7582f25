"""The feed-forward part of a dense layer."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_sigma.config.model import ModelConfig
from pangu_sigma.model.affine import Affine
from parallel.compiled import CompiledFeedForward
from parallel.layout import Layout
from parallel.primitives import activation


class DenseFeedForward(nn.Cell):
    """x_TD -> y_TD: activation(x W_up + b_up) W_down + b_down, one network for every token."""

    def __init__(self, model: ModelConfig, layout: Layout, compute: ms.dtype, residual_std: float) -> None:
        super().__init__()
        self.up = Affine(model.hidden, model.ffn, layout, compute, model.init_std)
        self.down = Affine(model.ffn, model.hidden, layout, compute, residual_std)
        self.uses_kernels = bool(layout.kernels)
        if self.uses_kernels:
            self.network = CompiledFeedForward(layout.kernels, model.activation)
        else:
            self.activation = activation(model.activation, layout)

    def construct(self, x: Tensor) -> Tensor:
        if self.uses_kernels:
            rows = x.shape[0]
            # One slot that takes every row: both are constants of the graph.
            order, offsets = ops.arange(rows).astype(ms.int32), Tensor([0, rows], ms.int32)
            weights = (self.up.weight, self.up.bias, self.down.weight, self.down.bias)
            return self.network(x, order, offsets, weights)[0]
        return self.down(self.activation(self.up(x))[0])
