"""Forward pass: a graph over a micro-batch, and what it makes of the network's hidden rows: a loss, token losses or
logits.

Losses beside the mean token loss bring cells of their own (`train.continual.distillation`, `finetuning.dpo`).

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from pangu_sigma.model.graph_inputs import GraphInputs, split_inputs
from pangu_sigma.model.pangu import PanGuSigma
from parallel.operator_layout import Layout


class HeadOutput(nn.Cell):
    """What a forward pass gives: (h_TD, labels int32 [B, S], domain [B], word table, weights float32 [B, S], extra) ->
    the pass's output, or of a loss (objective, sums per sample) without the routers' auxiliary losses.

    `head` is the network's. `extra`: inputs of the graph that a loss takes beside the batch.
    """

    is_loss = False

    def __init__(self, head: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.head = head


class TokenLosses(HeadOutput):
    """-log p(label) float32 [B, S], in nats."""

    def construct(self, h, labels: Tensor, domain: Tensor, table: Tensor, weights: Tensor, extra: tuple):
        return self.head(h, labels, domain, table)


class Logits(HeadOutput):
    """Next-token logits float32 [B, S, V]."""

    def construct(self, h, labels: Tensor, domain: Tensor, table: Tensor, weights: Tensor, extra: tuple):
        return self.head.logits(h, labels.shape[0], domain, table)


class WeightedLoss(HeadOutput):
    """Sum over tokens of weight * loss, and the loss sums per sample [B] over tokens of positive weight.

    The weights are the labels' mask / tokens of the step * loss scale, so this is a mean's share of one micro-batch.
    """

    is_loss = True

    def __init__(self, head: nn.Cell, layout: Layout) -> None:
        super().__init__(head)
        by_row = ("rows", 1)
        self.sum = layout(ops.ReduceSum(), by_row)
        self.mul = layout(ops.Mul(), by_row, by_row)
        self.greater = layout(ops.Greater(), by_row, ())
        self.cast = layout(ops.Cast(), by_row)
        self.zero = Tensor(0.0, ms.float32)

    def construct(self, h, labels: Tensor, domain: Tensor, table: Tensor, weights: Tensor, extra: tuple):
        losses = self.head(h, labels, domain, table)
        return self.sum(self.mul(losses, weights)), self.sum_counted(losses, weights)

    def sum_counted(self, losses: Tensor, weights: Tensor) -> Tensor:
        """Sums per sample [B] of what has a positive weight; no gradient flows through them."""
        return self.sum(self.mul(ops.stop_gradient(losses), self.cast(self.greater(weights, self.zero), ms.float32)), 1)


class ForwardPass(nn.Cell):
    """All inputs of a graph (`GraphInputs`) -> what `output` makes of the network's hidden rows.

    Of a loss: (objective, sums per sample, auxiliary loss, rows [B, E + 1] of learned gates), the objective with
    `auxiliary_weight` * auxiliary loss added.
    """

    def __init__(self, net: PanGuSigma, inputs: GraphInputs, output: HeadOutput) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.output = output
        self.is_loss = output.is_loss
        self.bounds = inputs.bounds

    def construct(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor,
        auxiliary_weight: Tensor,
        positions: Tensor,
        segments: Tensor,
        domain: Tensor,
        keys: Tensor,
        *flat: Tensor,
    ):
        tables, sparse_inputs, extra = split_inputs(flat, self.bounds)
        h, auxiliary, counts = self.net(tokens, positions, segments, domain, keys, tables, sparse_inputs)
        output = self.output(h, labels, domain, self.net.output_table(tables, tokens), weights, extra)
        if not self.is_loss:
            return output
        objective, sums = output
        objective = objective + auxiliary * auxiliary_weight
        return objective, ops.stop_gradient(sums), ops.stop_gradient(auxiliary), counts
