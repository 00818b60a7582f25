"""Dense feed-forward networks (`config.parts.feed_forward_kinds`), which shared experts are too: two matrices (MLP) or
gated by a third (SwiGLU, GEGLU)."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_sigma.config.model_section import ModelConfig
from pangu_sigma.model.layers.linear import LinearCell
from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledFeedForward
from parallel.ops.primitives import activation
from rre.feed_forward_spec import FeedForwardSpec


class MlpFeedForward(nn.Cell):
    """MLP: x_TD -> y_TD, activation(x W_up + b_up) W_down + b_down, biases where there are."""

    def __init__(self, model: ModelConfig, form: FeedForwardSpec, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        std, biases, residual_std = model.init_std, form.biases, model.residual_std
        self.up = LinearCell(model.hidden, model.ffn, layout, compute, std, biases, (1, "tensor"))
        self.down = LinearCell(model.ffn, model.hidden, layout, compute, residual_std, biases, ("tensor", 1))
        self.has_biases = form.biases
        self.uses_kernels = bool(layout.product_kernels)
        if self.uses_kernels:
            self.network = CompiledFeedForward(layout.kernels, form.activation, tensors=len(form.tensors))
        else:
            self.activation = activation(form.activation, layout, ("rows", "tensor"))

    def construct(self, x: Tensor) -> Tensor:
        if self.uses_kernels:
            if self.has_biases:
                return on_every_row(self.network, x, (self.up.weight, self.up.bias, self.down.weight, self.down.bias))
            return on_every_row(self.network, x, (self.up.weight, self.down.weight))
        return self.down(self.activation(self.up(x))[0])


class GatedFeedForward(nn.Cell):
    """Gated MLP (SwiGLU, GEGLU): x_TD -> y_TD, (activation(x W_gate) * (x W_up)) W_down (see `FeedForwardSpec`)."""

    def __init__(self, model: ModelConfig, form: FeedForwardSpec, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        std, inner = model.init_std, ("rows", "tensor")
        self.gate = LinearCell(model.hidden, model.ffn, layout, compute, std, biases=False, cut=(1, "tensor"))
        self.up = LinearCell(model.hidden, model.ffn, layout, compute, std, biases=False, cut=(1, "tensor"))
        down_std = model.residual_std
        self.down = LinearCell(model.ffn, model.hidden, layout, compute, down_std, biases=False, cut=("tensor", 1))
        self.uses_kernels = bool(layout.product_kernels)
        if self.uses_kernels:
            self.network = CompiledFeedForward(layout.kernels, form.activation, tensors=len(form.tensors))
        else:
            self.activation = activation(form.activation, layout, inner)
            self.mul = layout(ops.Mul(), inner, inner)

    def construct(self, x: Tensor) -> Tensor:
        if self.uses_kernels:
            return on_every_row(self.network, x, (self.gate.weight, self.up.weight, self.down.weight))
        return self.down(self.mul(self.activation(self.gate(x))[0], self.up(x)))


def on_every_row(network: nn.Cell, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """y_TD of a compiled expert kernel as a dense network: one slot that takes every row, so order and offsets are
    constants."""
    rows = x.shape[0]
    order, offsets = ops.arange(rows).astype(ms.int32), Tensor([0, rows], ms.int32)
    return network(x, order, offsets, weights)[0]
