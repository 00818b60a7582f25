"""Adaptive mixture of local experts as a model's top layer: every expert predicts the next token by itself, and the
model's distribution is their mixture sum_i p_i softmax(logits_i) (Jacobs, Jordan, Nowlan and Hinton 1991, Neural
Computation 3, pages 79 to 87, equation 1.3).

`MixtureLayer` stands where the top transformer layer stands, `MixtureHead` where the head stands. Between them goes, in
place of h_TD, a pair: the hidden rows of every expert h [E * T, D], expert by expert, and log p [T, E]. `MixtureNorm`
is the norm in between where a model has no query layer. The paper's cooperative form (equation 1.1) blends outputs, so
it needs none of these: it is a `TransformerLayer` with `rre.routers.every_expert`'s gate under the model's own head.

Legend: B samples, S positions, T = B*S rows, D hidden width, V vocabulary, E experts of the top layer.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from pangu_sigma.model.layers.transformer_layer import TransformerLayer
from parallel.operator_layout import Layout
from rre.every_expert_layer import RepeatRows


class MixtureLayer(TransformerLayer):
    """`TransformerLayer` that gives (h + y_i of every expert [E * T, D], log p [T, E]) in place of h_TD.

    `sparse` is an `EveryExpertFeedForward`; h is the residual stream after attention, y_i expert i's output. All
    experts of a token are under the same dropout.
    """

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.repeat_rows = RepeatRows()

    def add_feed_forward(self, h: Tensor, y: tuple[Tensor, Tensor], keys: Tensor):
        outputs, log_p_TE = y
        experts = outputs.shape[0] // h.shape[0]
        outputs = self.feed_forward_dropout(outputs, ops.tile(keys, (experts,)))
        return self.add(self.repeat_rows(h, outputs.shape), outputs), log_p_TE


class MixtureNorm(nn.Cell):
    """`norm` for the hidden rows of every expert: (h [E * T, D], log p [T, E]) -> (norm h, log p)."""

    def __init__(self, norm: nn.Cell) -> None:
        super().__init__()
        self.row_norm = norm

    def construct(self, h: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rows, log_p_TE = h
        return self.row_norm(rows), log_p_TE


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
    """E tensors of logits [N, V], log p [N, E] -> log sum_i p_i softmax(logits_i) [N, V], whose softmax is itself.

    N: rows. One expert after the other, so that no more than three such tensors are needed at a time where there is no
    gradient.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.log_sum = LogSumExp(1, layout)
        self.pair_log_sum = LogSumExp(0, layout, rank=3)
        self.stack = layout(ops.Stack(0), (1, 1), (1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.add = layout(ops.Add(), (1, 1), (1, 1))

    def construct(self, logits: tuple[Tensor, ...], log_p_NE: Tensor) -> Tensor:
        mixed_NV = self.weigh(logits[0], log_p_NE[:, 0:1])
        for i in range(1, len(logits)):
            expert_NV = self.weigh(logits[i], log_p_NE[:, i : i + 1])
            mixed_NV = self.pair_log_sum(self.stack((mixed_NV, expert_NV))).reshape(mixed_NV.shape)
        return mixed_NV

    def weigh(self, logits_NV: Tensor, log_p_N1: Tensor) -> Tensor:
        """log (p softmax(logits))."""
        return self.add(self.sub(logits_NV, self.log_sum(logits_NV)), log_p_N1)


class MixtureHead(nn.Cell):
    """Head of a competitive mixture: `head`, tied or not, for each of E experts. It has the head's methods, with the
    pair (h [E * T, D], log p [T, E]) in place of h_TD.

    The gradient of the loss by an expert's own loss is its responsibility p_i likelihood_i / sum_j p_j likelihood_j, so
    whoever predicts a token best learns it most.
    """

    def __init__(self, head: nn.Cell, experts: int, layout: Layout) -> None:
        super().__init__()
        self.expert_head = head
        self.experts = experts
        self.mix = MixedLogits(layout)
        self.log_sum_experts = LogSumExp(1, layout)
        self.log_sum_words = LogSumExp(1, layout)
        self.transpose = layout(ops.Transpose(), (1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.exp = layout(ops.Exp(), (1, 1))
        self.mul = layout(ops.Mul(), (1, 1), (1, 1))
        self.sum = layout(ops.ReduceSum(), (1, 1))
        self.take = layout(ops.GatherD(), (1, 1), (1, 1))
        self.rows = ops.Gather()

    def construct(self, h: tuple[Tensor, Tensor], labels: Tensor, domain: Tensor, table: Tensor) -> Tensor:
        """labels int32 [B, S] -> -log sum_i p_i likelihood_i of every token, float32 [B, S]."""
        rows, log_p_TE = h
        # The experts' rows are E times the batch, and so is what belongs to them.
        labels_of_rows, domain_of_rows = ops.tile(labels, (self.experts, 1)), ops.tile(domain, (self.experts,))
        losses = self.expert_head(rows, labels_of_rows, domain_of_rows, table)
        scores_TE = self.sub(log_p_TE, self.transpose(losses.reshape(self.experts, -1), (1, 0)))
        return -self.log_sum_experts(scores_TE).reshape(labels.shape)

    def against(
        self, h: tuple[Tensor, Tensor], labels: Tensor, domain: Tensor, table: Tensor, previous: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the call, with another model's logits [B, S, V]: (token losses, KL(previous || now)) float32 [B, S]."""
        log_q_TV = self.logits(h, labels.shape[0], domain, table).reshape(h[1].shape[0], -1)
        previous_TV = previous.reshape(log_q_TV.shape)
        previous_TV = ops.stop_gradient(self.sub(previous_TV, self.log_sum_words(previous_TV)))
        divergence = self.sum(self.mul(self.exp(previous_TV), self.sub(previous_TV, log_q_TV)), 1)
        losses = -self.take(log_q_TV, 1, labels.reshape(-1, 1))
        return losses.reshape(labels.shape), divergence.reshape(labels.shape)

    def select(self, h: tuple[Tensor, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to some of the T tokens, by their numbers int32 [n]."""
        rows, log_p_TE = h
        rows_ETD = rows.reshape(self.experts, -1, rows.shape[1])
        return self.rows(rows_ETD, tokens, 1).reshape(-1, rows.shape[1]), self.rows(log_p_TE, tokens, 0)

    def logits(self, h: tuple[Tensor, Tensor], batch: int, domain: Tensor, table: Tensor) -> Tensor:
        """The logarithms of the mixture's probabilities, float32 [B, S, V]."""
        rows, log_p_TE = h
        tokens = log_p_TE.shape[0]
        logits = ()
        for i in range(self.experts):
            expert_BSV = self.expert_head.logits(rows[i * tokens : (i + 1) * tokens], batch, domain, table)
            logits = logits + (expert_BSV.reshape(tokens, -1),)
        return self.mix(logits, log_p_TE).reshape(batch, tokens // batch, -1)
