"""Distillation loss: cross-entropy and the divergence from another model's distribution, over one set of logits, with
their gradient.

Legend: T rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout


class TiedCrossEntropyAgainst(nn.Cell):
    """Cross-entropy and KL divergence from a teacher, with a tied head: h_TD, table_VD, labels_T, previous logits_TV ->
    (loss_T, divergence_T, probabilities_TV, previous ones_TV).

    With logits_TV = h_TD @ table_VD^T, p their softmax and q that of the previous logits: loss = -log p[label] and
    divergence = KL(q || p) = sum_v q_v (log q_v - log p_v), both in nats (Hinton et al. 2015, arXiv 1503.02531, at
    temperature 1; Li and Hoiem 2016, arXiv 1606.09282, against forgetting). The previous logits are a constant.

    With g and k the two outputs' gradients, d/d logits = g (p - onehot) + k (p - q): one product with the table and
    one with h serve both. Losses saturate at 85 nats, where a probability leaves float32.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.logits = layout(ops.MatMul(transpose_b=True), (1, 1), (1, 1))
        self.product = layout(ops.MatMul(), (1, 1), (1, 1))
        self.by_transposed = layout(ops.MatMul(transpose_a=True), (1, 1), (1, 1))
        self.max = layout(ops.ReduceMax(keep_dims=True), (1, 1))
        self.sum = layout(ops.ReduceSum(keep_dims=True), (1, 1))
        self.exp = layout(ops.Exp(), (1, 1))
        self.log = layout(ops.Log(), (1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.add = layout(ops.Add(), (1, 1), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.div = layout(ops.Div(), (1, 1), (1, 1))
        self.pick = layout(ops.GatherD(), (1, 1), (1, 1))
        self.rows = layout(ops.Gather(), (1, 1), (1,))
        self.sum_by_label = layout(ops.UnsortedSegmentSum(), (1, 1), (1,))

    def softmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities_TV, log of their denominator_T1), with the rows' largest logits taken out."""
        largest = self.max(logits, -1)
        powers = self.exp(self.sub(logits, largest))
        total = self.sum(powers, -1)
        return self.div(powers, total), self.add(self.log(total), largest)

    def construct(
        self, h: Tensor, table: Tensor, labels: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.logits(h, table)
        p, log_total = self.softmax(logits)
        q, previous_log_total = self.softmax(previous)
        picked = self.pick(p, 1, labels.reshape(-1, 1)).reshape(-1)
        # As in `TiedCrossEntropy`: a tiny addition keeps log finite and lets NaN through.
        losses = -self.log(picked + 1e-37)
        cross_term = self.sum(self.mul(q, self.sub(previous, logits)), -1)
        divergence = self.sub(self.add(cross_term, log_total), previous_log_total).reshape(-1)
        return losses, divergence, p, q

    def bprop(
        self, h: Tensor, table: Tensor, labels: Tensor, previous: Tensor, out: tuple[Tensor, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        _, _, p, q = out
        to_label, to_previous = dout[0].reshape(-1, 1), dout[1].reshape(-1, 1)
        dlogits = self.sub(self.mul(p, self.add(to_label, to_previous)), self.mul(q, to_previous))
        weight = self.product(to_label, ops.ones((1, h.shape[1]), ms.float32))
        dh = self.sub(self.product(dlogits, table), self.mul(self.rows(table, labels, 0), weight))
        by_label = self.sum_by_label(self.mul(h, weight), labels, table.shape[0])
        dtable = self.sub(self.by_transposed(dlogits, h), by_label)
        return dh, dtable, labels, ops.zeros_like(previous)
