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


class DenseFeedForward(nn.Cell):
    """Feed-forward network of `form`: x_TD -> y_TD, activation(x W_up + b_up) W_down + b_down with biases where there
    are, or gated (SwiGLU, GEGLU) (activation(x W_gate) * (x W_up)) W_down (see `FeedForwardSpec`)."""

    def __init__(self, model: ModelConfig, form: FeedForwardSpec, layout: Layout, compute: ms.dtype) -> None:
        super().__init__()
        inner, into_inner = ("rows", "tensor"), (model.hidden, model.ffn, layout, compute, model.init_std, form.biases)
        self.is_gated, self.has_biases = form.gated, form.biases
        if form.gated:
            self.gate = LinearCell(*into_inner, (1, "tensor"))
        self.up = LinearCell(*into_inner, (1, "tensor"))
        self.down = LinearCell(model.ffn, model.hidden, layout, compute, model.residual_std, form.biases, ("tensor", 1))
        self.uses_kernels = bool(layout.product_kernels)
        if self.uses_kernels:
            self.network = CompiledFeedForward(layout.kernels, form.activation, tensors=len(form.tensors))
        else:
            self.activation = activation(form.activation, layout, inner)
            self.mul = layout(ops.Mul(), inner, inner)

    def construct(self, x: Tensor) -> Tensor:
        if self.uses_kernels and self.is_gated:
            return on_every_row(self.network, x, (self.gate.weight, self.up.weight, self.down.weight))
        if self.uses_kernels and self.has_biases:
            return on_every_row(self.network, x, (self.up.weight, self.up.bias, self.down.weight, self.down.bias))
        if self.uses_kernels:
            return on_every_row(self.network, x, (self.up.weight, self.down.weight))
        if self.is_gated:
            return self.down(self.mul(self.activation(self.gate(x))[0], self.up(x)))
        return self.down(self.activation(self.up(x))[0])


def on_every_row(network: nn.Cell, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """y_TD of a compiled expert kernel as a dense network: one slot that takes every row, so order and offsets are
    constants."""
    rows = x.shape[0]
    order, offsets = ops.arange(rows).astype(ms.int32), Tensor([0, rows], ms.int32)
    return network(x, order, offsets, weights)[0]
