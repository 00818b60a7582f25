"""The experts' computation: one feed-forward network per slot, on exactly the rows that the slot was given."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout
from parallel.ops.compiled_kernels import CompiledFeedForward
from parallel.ops.primitives import Linear, Product, activation
from rre.dispatch.dispatch_plan import EXACT_ROWS
from rre.dispatch.expert_dispatch import TokenCombine, TokenDispatch
from rre.feed_forward_spec import FeedForwardSpec


class Expert(nn.Cell):
    """x [rows, D] and the tensors of one network in the order of its form -> [rows, D], of MindSpore's operators."""

    def __init__(self, layout: Layout, form: FeedForwardSpec, compute: ms.dtype) -> None:
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

    def __init__(self, layout: Layout, form: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.each = len(form.tensors)
        self.network = Expert(layout, form, compute)

    def construct(self, rows: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results = ()
        for slot in range(len(rows)):
            results = results + (self.network(rows[slot], weights[self.each * slot : self.each * (slot + 1)]),)
        return results


class RaggedExperts(nn.Cell):
    """x_TD, plan (rows of N slots and of the dropped, position [T, k]), N networks -> y [T*k, D] by choice."""

    def __init__(self, layout: Layout, form: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.dispatch = TokenDispatch(layout)
        self.experts = Experts(layout, form, compute)
        self.combine = TokenCombine(layout)

    def construct(self, x: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        rows, position = plan[:-1], plan[-1]
        return self.combine(self.experts(self.dispatch(x, rows, position), weights), rows, position, x)


class CompiledExperts(nn.Cell):
    """The same function as one compiled kernel; its plan is (order [T*k], offsets [N + 1])."""

    def __init__(self, kernels: str, form: FeedForwardSpec) -> None:
        super().__init__()
        self.experts = CompiledFeedForward(kernels, form.activation, EXACT_ROWS, len(form.tensors))

    def construct(self, x: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        return self.experts(x, plan[0], plan[1], weights)[0]
