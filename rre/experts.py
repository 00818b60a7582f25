"""The experts' computation: one feed-forward network per slot, on exactly the rows that the slot was given."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.primitives import Linear, Product, activation
from rre.feed_forward_form import NetworkForm


class Network(nn.Cell):
    """x [rows, D] and the tensors of one network in the order of its form -> [rows, D], of MindSpore's operators."""

    def __init__(self, layout: Layout, form: NetworkForm, compute: ms.dtype) -> None:
        super().__init__()
        self.form = form
        self.linear = Linear(layout, compute) if form.biases else Product(layout, compute)
        self.activation = activation(form.activation, layout)
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))

    def construct(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if self.form.gated:
            gated = self.mul(self.activation(self.linear(x, weights[0]))[0], self.linear(x, weights[1]))
            return self.linear(gated, weights[2])
        if self.form.biases:
            inner = self.activation(self.linear(x, weights[0], weights[1]))[0]
            return self.linear(inner, weights[2], weights[3])
        return self.linear(self.activation(self.linear(x, weights[0]))[0], weights[1])


class Experts(nn.Cell):
    """N tensors x_i [rows_i, D] and the tensors of N networks -> N tensors [rows_i, D].

    Weights are inputs, not parameters: they live in an expert store, and the graph returns their gradients. Slots may
    share an expert. The weight gradients of a slot without rows are a product over nothing, whose memory MindSpore
    leaves as it was: whoever takes gradients must not look at them.
    """

    def __init__(self, layout: Layout, form: NetworkForm, compute: ms.dtype) -> None:
        super().__init__()
        self.each = len(form.tensors)
        self.network = Network(layout, form, compute)

    def construct(self, rows: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results = ()
        for slot in range(len(rows)):
            results = results + (self.network(rows[slot], weights[self.each * slot : self.each * (slot + 1)]),)
        return results
