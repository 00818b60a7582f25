"""Dispatch and combine of token rows (token permutation and its reverse), dropless: gathers with their own gradients.

Dispatch gathers each slot's rows as `rre.dispatch.dispatch_plan` lists them; combine puts the results back in token
order.

Legend: T tokens, D hidden width, K choices per token (top-k), N slots, R = T K rows (one per choice).
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout


class TokenDispatch(nn.Cell):
    """Token dispatch: x_TD, rows (N + 1 vectors of choice numbers), position [T, K] -> N tensors [rows_i, D].

    The gradient is a gather by `position` and a sum over a token's choices.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.concat = layout(ops.Concat(0))
        self.zeros = layout(ops.ZerosLike(), (1, 1))
        self.choice_sum = layout(ops.ReduceSum(), (1, 1, 1))

    def construct(self, x_TD: Tensor, rows: tuple[Tensor, ...], position_TK: Tensor) -> tuple[Tensor, ...]:
        num_choices = position_TK.shape[1]
        rows_RD = ()
        for choices in rows[:-1]:
            tokens = choices if num_choices == 1 else choices // num_choices
            rows_RD = rows_RD + (self.take(x_TD, tokens, 0),)
        return rows_RD

    def bprop(
        self, x_TD: Tensor, rows: tuple[Tensor, ...], position_TK: Tensor, out: tuple[Tensor, ...],
        drows_RD: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:  # fmt: skip
        num_choices = position_TK.shape[1]
        dropped_RD = self.zeros(self.take(x_TD, rows[-1] if num_choices == 1 else rows[-1] // num_choices, 0))
        dx_TD = self.take(self.concat(drows_RD + (dropped_RD,)), position_TK.reshape(-1), 0)
        if num_choices > 1:
            dx_TD = self.choice_sum(dx_TD.reshape(x_TD.shape[0], num_choices, x_TD.shape[1]), 1)
        # Whole-number inputs have no gradient; the graph drops what stands in their place.
        return dx_TD, rows, position_TK


class TokenCombine(nn.Cell):
    """Token combine, the reverse of `TokenDispatch`: N tensors [rows_i, D], rows, position [T, K], x_TD -> y_RD.

    The K results of a token stand together; a dropped one is 0. `x_TD` only gives the dropped rows their width.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.take = layout(ops.Gather(), (1, 1), (1,))
        self.concat = layout(ops.Concat(0))
        self.zeros = layout(ops.ZerosLike(), (1, 1))

    def construct(
        self, results_RD: tuple[Tensor, ...], rows: tuple[Tensor, ...], position_TK: Tensor, x_TD: Tensor
    ) -> Tensor:
        num_choices = position_TK.shape[1]
        dropped_RD = self.zeros(self.take(x_TD, rows[-1] if num_choices == 1 else rows[-1] // num_choices, 0))
        return self.take(self.concat(results_RD + (dropped_RD,)), position_TK.reshape(-1), 0)

    def bprop(
        self, results_RD: tuple[Tensor, ...], rows: tuple[Tensor, ...], position_TK: Tensor, x_TD: Tensor, out: Tensor,
        dy_RD: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]:
        dresults_RD = ()
        for choices in rows[:-1]:
            dresults_RD = dresults_RD + (self.take(dy_RD, choices, 0),)
        return dresults_RD, rows, position_TK, self.zeros(x_TD)
