"""The head of a competitive mixture: every expert of the top layer gives a next-token distribution of its own, and the
model's is their mixture sum_i p_i softmax(logits_i) (Jacobs et al. 1991; see `rre.routers.adaptive_mixture`).

In place of h_TD everything here takes (h of every expert [E * T, D], expert by expert, log p [T, E]).

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary, E experts of the top layer.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from parallel.operator_layout import Layout


class LogSumExp(nn.Cell):
    """x -> log sum exp x over `axis`, which is kept with length 1."""

    def __init__(self, axis: int, layout: Layout, rank: int = 2) -> None:
        super().__init__()
        self.axis = axis
        cut = (1,) * rank
        self.largest = layout(ops.ReduceMax(keep_dims=True), cut)
        self.sub = layout(ops.Sub(), cut, cut)
        self.exp = layout(ops.Exp(), cut)
        self.sum = layout(ops.ReduceSum(keep_dims=True), cut)
        self.log = layout(ops.Log(), cut)
        self.add = layout(ops.Add(), cut, cut)

    def construct(self, x: Tensor) -> Tensor:
        largest = ops.stop_gradient(self.largest(x, self.axis))
        return self.add(self.log(self.sum(self.exp(self.sub(x, largest)), self.axis)), largest)


class MixedLogits(nn.Cell):
    """E tensors of logits [n, V], log p [n, E] -> log sum_i p_i softmax(logits_i) [n, V], whose softmax is itself.

    One expert after the other, so that no more than three such tensors are needed at a time where there is no gradient.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.pool = LogSumExp(1, layout)
        self.pair = LogSumExp(0, layout, rank=3)
        self.stack = layout(ops.Stack(0), (1, 1), (1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(self, logits: tuple[Tensor, ...], gate: Tensor) -> Tensor:
        mixed = self.scored(logits[0], gate[:, 0:1])
        for i in range(1, len(logits)):
            other = self.scored(logits[i], gate[:, i : i + 1])
            mixed = self.pair(self.stack((mixed, other))).reshape(mixed.shape)
        return mixed

    def scored(self, logits: Tensor, share: Tensor) -> Tensor:
        """log (p softmax(logits))."""
        return self.add(self.sub(logits, self.pool(logits)), share)


class CompetitiveHead(nn.Cell):
    """`head` for each of E experts; it has the head's methods, with the outputs of all experts in place of h_TD.

    The gradient of the loss by an expert's own loss is its responsibility p_i likelihood_i / sum_j p_j likelihood_j, so
    whoever predicts a token best learns it most.
    """

    def __init__(self, head: nn.Cell, experts: int, layout: Layout) -> None:
        super().__init__()
        self.each = head
        self.experts = experts
        self.mixed = MixedLogits(layout)
        self.pool = LogSumExp(1, layout)
        self.pool_words = LogSumExp(1, layout)
        self.turn = layout(ops.Transpose(), (1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.exp = layout(ops.Exp(), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.sum = layout(ops.ReduceSum(), (1, 1))
        self.take = layout(ops.GatherD(), (1, 1), (1, 1))

    def construct(self, h: tuple[Tensor, Tensor], labels: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        """labels int32 [B, S] -> -log sum_i p_i likelihood_i of every token, float32 [B, S]."""
        rows, gate = h
        # The experts' rows are E times the batch, and so is what belongs to them.
        losses = self.each(rows, ops.tile(labels, (self.experts, 1)), ops.tile(domain, (self.experts,)), table)
        scores = self.sub(gate, self.turn(losses.reshape(self.experts, -1), (1, 0)))
        return -self.pool(scores).reshape(labels.shape)

    def against(
        self, h: tuple[Tensor, Tensor], labels: Tensor, domain: Tensor, table: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the call, with another model's logits [B, S, V]: (token losses, KL(previous || now)) float32 [B, S]."""
        now = self.logits(h, labels.shape[0], domain, table).reshape(h[1].shape[0], -1)
        before = previous.reshape(now.shape)
        before = ops.stop_gradient(self.sub(before, self.pool_words(before)))
        apart = self.sum(self.mul(self.exp(before), self.sub(before, now)), 1)
        losses = -self.take(now, 1, labels.reshape(-1, 1))
        return losses.reshape(labels.shape), apart.reshape(labels.shape)

    def logits(self, h: tuple[Tensor, Tensor], batch: int, domain: Tensor, table: Tensor) -> Tensor:
        """The logarithms of the mixture's probabilities, float32 [B, S, V]."""
        rows, gate = h
        tokens = gate.shape[0]
        logits = ()
        for i in range(self.experts):
            own = self.each.logits(rows[i * tokens : (i + 1) * tokens], batch, domain, table)
            logits = logits + (own.reshape(tokens, -1),)
        return self.mixed(logits, gate).reshape(batch, tokens // batch, -1)
