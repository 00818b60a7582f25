"""Dispatch and combine of token rows (token permutation and its reverse), dropless: gathers with their own gradients.

Dispatch gathers each slot's rows as `rre.dispatch.dispatch_plan` lists them; combine puts the results back in token
order.

Legend: T tokens, D hidden width, K choices per token (top-k), N slots, R rows of all slots.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout


class TokenDispatch(nn.Cell):
    """x_TD, rows (N + 1 vectors), position [T, k] -> N tensors [rows_i, D]."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.concat = layout(ops.Concat(0))
        self.zeros = layout(ops.ZerosLike(), (1, 1))
        self.choice_sum = layout(ops.ReduceSum(), (1, 1, 1))

    def construct(self, x: Tensor, rows: tuple[Tensor, ...], position: Tensor) -> tuple[Tensor, ...]:
        k = position.shape[1]
        taken = ()
        for choices in rows[:-1]:
            tokens = choices if k == 1 else choices // k
            taken = taken + (self.take(x, tokens, 0),)
        return taken

    def bprop(
        self, x: Tensor, rows: tuple[Tensor, ...], position: Tensor, out: tuple[Tensor, ...], dout: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        k = position.shape[1]
        dropped = self.zeros(self.take(x, rows[-1] if k == 1 else rows[-1] // k, 0))
        back = self.take(self.concat(dout + (dropped,)), position.reshape(-1), 0)
        if k > 1:
            back = self.choice_sum(back.reshape(x.shape[0], k, x.shape[1]), 1)
        # Whole-number inputs have no gradient; the graph drops what stands in their place.
        return back, rows, position


class TokenCombine(nn.Cell):
    """N tensors [rows_i, D], rows, position [T, k], x_TD -> y [T*k, D], choices of a token together.

    Dropped rows are 0. The reverse of TokenDispatch; `x` only gives the dropped rows their width.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.concat = layout(ops.Concat(0))
        self.zeros = layout(ops.ZerosLike(), (1, 1))

    def construct(
        self, results: tuple[Tensor, ...], rows: tuple[Tensor, ...], position: Tensor, x: Tensor
    ) -> Tensor:
        k = position.shape[1]
        dropped = self.zeros(self.take(x, rows[-1] if k == 1 else rows[-1] // k, 0))
        return self.take(self.concat(results + (dropped,)), position.reshape(-1), 0)

    def bprop(
        self, results: tuple[Tensor, ...], rows: tuple[Tensor, ...], position: Tensor, x: Tensor, out: Tensor,
        dout: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]:
        back = ()
        for choices in rows[:-1]:
            back = back + (self.take(dout, choices, 0),)
        return back, rows, position, self.zeros(x)
