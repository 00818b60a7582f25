"""Auxiliary losses of learned gates (load balance, z-loss, variation), as cells; each docstring says whose form it is.

They are of all tokens of a step, wherever they are: several processes average (or sum) what is linear in the tokens
before anything is multiplied or squared. Where rows are filled up with padding, `text` is (text_T1,), 1 where a
position holds text, and only those count; else it is ().

Legend: T tokens, E experts, K choices per token (top-k).
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.comm.exchange import GatheredExchange, LocalExchange
from parallel.operator_layout import Layout


class TextMeans(nn.Cell):
    """Means over the tokens of text of all processes, where rows are filled up with padding."""

    def __init__(self, layout: Layout, exchange: GatheredExchange | None = None) -> None:
        super().__init__()
        self.exchange = exchange or LocalExchange()
        self.sum_all = layout(ops.ReduceSum(), ("rows", 1))
        self.sum_rows = layout(ops.ReduceSum(), ("rows", 1))
        self.count = layout(ops.ReduceSum(), ("rows", 1, 1))
        self.mul = layout(ops.Mul(), ("rows", 1), ("rows", 1))

    def tokens(self, text_T1: Tensor) -> Tensor:
        """How many tokens of text there are, at least 1: float32 [1]."""
        return ops.maximum(self.exchange.total(self.sum_all(text_T1).reshape(1)), Tensor(1.0, ms.float32))

    def construct(self, values_TN: Tensor, text_T1: Tensor) -> Tensor:
        """values [T, N] -> their means [N]."""
        return self.exchange.total(self.sum_rows(self.mul(values_TN, text_T1), 0)) / self.tokens(text_T1)

    def hits(self, hits_TKE: Tensor, text_T1: Tensor) -> Tensor:
        """Mean number of a token's choices that fell on each expert [E]; padding has none."""
        return self.exchange.total(self.count(hits_TKE, (0, 1))) / self.tokens(text_T1)


class BalanceLoss(nn.Cell):
    """Load-balance loss: hits [T, K, E], probabilities [T, E] -> weight * E * sum_e f_e P_e.

    f_e is the share of the T K choices that fell on e (divided by K, so that sum f = 1; a constant in the gradient),
    P_e the mean probability of e over the tokens. Even routing gives `weight`. Switch's form (arXiv 2101.03961,
    equations 4 to 6) for K = 1.
    """

    def __init__(self, weight: float, experts: int, layout: Layout, exchange: GatheredExchange | None = None) -> None:
        super().__init__()
        self.factor = weight * experts
        self.exchange = exchange or LocalExchange()
        self.count = layout(ops.ReduceSum(), ("rows", 1, 1))
        self.mean = layout(ops.ReduceMean(), ("rows", 1))
        self.sum = layout(ops.ReduceSum(), (1,))
        self.mul = layout(ops.Mul(), (1,), (1,))
        self.of_choices = layout(ops.Div(), (1,), ())
        self.of_text = TextMeans(layout, exchange)

    def construct(self, hits_TKE: Tensor, probs_TE: Tensor, text: tuple[Tensor, ...] = ()) -> Tensor:
        if len(text) > 0:
            of_each_E = self.of_text.hits(hits_TKE, text[0])
            share_E = self.of_choices(of_each_E, Tensor(float(hits_TKE.shape[1]), ms.float32))
            return self.sum(self.mul(share_E, self.of_text(probs_TE, text[0]))) * self.factor
        choices = Tensor(float(hits_TKE.shape[0] * hits_TKE.shape[1]), ms.float32)
        share_E = self.exchange.mean(self.of_choices(self.count(hits_TKE, (0, 1)), choices))
        mean_E = self.exchange.mean(self.mean(probs_TE, 0))
        return self.sum(self.mul(share_E, mean_E)) * self.factor


class PooledMeans(nn.Cell):
    """One layer's part of a pooled balance loss: hits [T, K, E], probabilities [T, E], another loss -> [2 E + 2].

    The values are f (a constant in the gradient), P, the other loss, 1.

    f_e is the mean number of a token's choices that fell on e (sum f = K). Added up over layers this is what
    `PooledBalanceLoss` takes.
    """

    def __init__(self, layout: Layout, exchange: GatheredExchange | None = None) -> None:
        super().__init__()
        self.exchange = exchange or LocalExchange()
        self.count = layout(ops.ReduceSum(), (1, 1, 1))
        self.mean = layout(ops.ReduceMean(), (1, 1))
        self.concat = layout(ops.Concat(0))
        self.of_text = TextMeans(layout, exchange)

    def construct(self, hits_TKE: Tensor, probs_TE: Tensor, other: Tensor, text: tuple[Tensor, ...] = ()) -> Tensor:
        if len(text) > 0:
            share_E, mean_E = self.of_text.hits(hits_TKE, text[0]), self.of_text(probs_TE, text[0])
        else:
            share_E = self.exchange.mean(self.count(hits_TKE, (0, 1)) / hits_TKE.shape[0])
            mean_E = self.exchange.mean(self.mean(probs_TE, 0))
        one = ops.ones((1,), ms.float32)
        return self.concat((share_E, mean_E, other.reshape(1), one))


class PooledBalanceLoss(nn.Cell):
    """Load-balance loss pooled over layers: the sum over L layers of `PooledMeans` -> weight * E * sum_e f_e P_e.

    f and P are means over layers; the sum of the other losses is added.
    """

    def __init__(self, weight: float, experts: int, layout: Layout) -> None:
        super().__init__()
        self.experts = experts
        self.factor = weight * experts
        self.sum = layout(ops.ReduceSum(), (1,))
        self.mul = layout(ops.Mul(), (1,), (1,))

    def construct(self, sums: Tensor) -> Tensor:
        e = self.experts
        layers = ops.stop_gradient(sums[2 * e + 1])
        return self.sum(self.mul(sums[:e], sums[e : 2 * e])) * self.factor / (layers * layers) + sums[2 * e]


class ZLoss(nn.Cell):
    """Router z-loss: logits [T, E] -> weight * mean_t (logsumexp_e logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""

    def __init__(self, weight: float, layout: Layout, exchange: GatheredExchange | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.exchange = exchange or LocalExchange()
        self.max = layout(ops.ReduceMax(keep_dims=True), ("rows", 1))
        self.sub = layout(ops.Sub(), ("rows", 1), ("rows", 1))
        self.exp = layout(ops.Exp(), ("rows", 1))
        self.log = layout(ops.Log(), ("rows", 1))
        self.sum = layout(ops.ReduceSum(keep_dims=True), ("rows", 1))
        self.square = layout(ops.Square(), ("rows", 1))
        self.mean = layout(ops.ReduceMean(), ("rows", 1))
        self.add = layout(ops.Add(), ("rows", 1), ("rows", 1))
        self.of_text = TextMeans(layout, exchange)

    def construct(self, logits_TE: Tensor, text: tuple[Tensor, ...] = ()) -> Tensor:
        largest_T1 = ops.stop_gradient(self.max(logits_TE, -1))
        logsumexp_T1 = self.add(self.log(self.sum(self.exp(self.sub(logits_TE, largest_T1)), -1)), largest_T1)
        if len(text) > 0:
            return self.of_text(self.square(logsumexp_T1), text[0]).reshape(()) * self.weight
        return self.exchange.mean(self.mean(self.square(logsumexp_T1)).reshape(1)).reshape(()) * self.weight


class VariationLoss(nn.Cell):
    """Coefficient-of-variation loss: values [E] -> weight * CV(values)^2.

    CV^2 is the population variance over the squared mean (arXiv 1701.06538, equation 7).
    """

    def __init__(self, weight: float, layout: Layout, exchange: GatheredExchange | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.exchange = exchange or LocalExchange()
        self.mean = layout(ops.ReduceMean(keep_dims=True), (1,))
        self.sub = layout(ops.Sub(), (1,), (1,))
        self.square = layout(ops.Square(), (1,))
        self.div = layout(ops.Div(), (1,), (1,))
        self.sum = layout(ops.ReduceSum(), (1,))

    def construct(self, values_E: Tensor) -> Tensor:
        values_E = self.exchange.total(values_E)
        mean = self.mean(values_E)
        variance = self.mean(self.square(self.sub(values_E, mean)))
        # The small number is that of the authors' code: a layer in which nothing was routed has loss 0.
        return self.sum(self.div(variance, self.square(mean) + 1e-10)) * self.weight
