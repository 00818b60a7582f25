"""Dropless experts: one feed-forward network per slot, on exactly the rows that the slot was given.

Legend: T tokens, K choices per token (top-k), R rows, N slots, D hidden width, F feed-forward width.
"""

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
    """Feed-forward network of one expert: x_RD and its tensors in the order of the spec -> y_RD."""

    def __init__(self, layout: Layout, spec: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.linear = Linear(layout, compute) if spec.biases else Product(layout, compute)
        self.activation = activation(spec.activation, layout)
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))

    def construct(self, x_RD: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if self.spec.gated:
            gated_RF = self.mul(self.activation(self.linear(x_RD, weights[0]))[0], self.linear(x_RD, weights[1]))
            return self.linear(gated_RF, weights[2])
        if self.spec.biases:
            inner_RF = self.activation(self.linear(x_RD, weights[0], weights[1]))[0]
            return self.linear(inner_RF, weights[2], weights[3])
        return self.linear(self.activation(self.linear(x_RD, weights[0]))[0], weights[1])


class Experts(nn.Cell):
    """Experts of N slots: N tensors x_i [rows_i, D] and the tensors of N experts -> N tensors [rows_i, D].

    Weights are inputs, not parameters: they live in an expert store, and the graph returns their gradients. Slots may
    share an expert. The weight gradients of a slot without rows are a product over nothing, whose memory MindSpore
    leaves as it was: whoever takes gradients must not look at them.
    """

    def __init__(self, layout: Layout, spec: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.each = len(spec.tensors)
        self.network = Expert(layout, spec, compute)

    def construct(self, rows_RD: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results_RD = ()
        for slot in range(len(rows_RD)):
            results_RD = results_RD + (self.network(rows_RD[slot], weights[self.each * slot : self.each * (slot + 1)]),)
        return results_RD


class RaggedExperts(nn.Cell):
    """Dispatch, experts and combine over row lists of any length, in MindSpore operators.

    x_TD, plan (choice numbers of N slots and of the dropped, position [T, K]), tensors of N experts -> y_RD, a row per
    choice.
    """

    def __init__(self, layout: Layout, spec: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.dispatch = TokenDispatch(layout)
        self.experts = Experts(layout, spec, compute)
        self.combine = TokenCombine(layout)

    def construct(self, x_TD: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        rows, position_TK = plan[:-1], plan[-1]
        return self.combine(self.experts(self.dispatch(x_TD, rows, position_TK), weights), rows, position_TK, x_TD)


class ExpertPerRow(nn.Cell):
    """Experts of a decode step: row i goes through the i-th expert alone, so what it gives depends on no other row.

    x_TD, no plan, tensors of T experts -> y_TD, T being `rows`.
    """

    def __init__(self, layout: Layout, spec: FeedForwardSpec, compute: ms.dtype, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.experts = Experts(layout, spec, compute)
        self.split = layout(ops.Split(0, rows), (1, 1))
        self.concat = layout(ops.Concat(0))

    def construct(self, x_TD: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        if self.rows == 1:
            return self.experts((x_TD,), weights)[0]
        return self.concat(self.experts(self.split(x_TD), weights))


class CompiledExperts(nn.Cell):
    """Dispatch, experts and combine as one compiled kernel: the function of `RaggedExperts`.

    Its plan is (order [R], offsets [N + 1]) of `rre.dispatch.dispatch_plan`. `exact_rows`: see `CompiledFeedForward`.
    """

    def __init__(self, kernels: str, spec: FeedForwardSpec, exact_rows: int = EXACT_ROWS) -> None:
        super().__init__()
        self.experts = CompiledFeedForward(kernels, spec.activation, exact_rows, len(spec.tensors))

    def construct(self, x_TD: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        return self.experts(x_TD, plan[0], plan[1], weights)[0]
