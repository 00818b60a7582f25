"""The experts' computation: one feed-forward network per slot, on exactly the rows that the slot was given."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from parallel.layout import Layout
from parallel.primitives import Linear, activation

TENSORS_PER_EXPERT = ("up.weight", "up.bias", "down.weight", "down.bias")


def expert_shapes(hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one expert's tensors, in the order in which the graph takes them."""
    return dict(zip(TENSORS_PER_EXPERT, ((hidden, ffn), (ffn,), (ffn, hidden), (hidden,)), strict=True))


class Experts(nn.Cell):
    """N tensors x_i [rows_i, D] and 4 N weights -> N tensors [rows_i, D]: activation(x W_up + b_up) W_down + b_down.

    Weights are inputs, not parameters: they live in an expert store, and the graph returns their gradients. Slots may
    share an expert. The weight gradients of a slot without rows are a product over nothing, whose memory MindSpore
    leaves as it was: whoever takes gradients must not look at them.
    """

    def __init__(self, layout: Layout, activation_name: str, compute: ms.dtype) -> None:
        super().__init__()
        self.linear = Linear(layout, compute)
        self.activation = activation(activation_name, layout)

    def construct(self, rows: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results = ()
        for slot in range(len(rows)):
            up, up_bias, down, down_bias = weights[4 * slot : 4 * slot + 4]
            inner = self.activation(self.linear(rows[slot], up, up_bias))[0]
            results = results + (self.linear(inner, down, down_bias),)
        return results
