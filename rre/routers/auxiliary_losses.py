"""Auxiliary losses of learned gates, as cells; each docstring says whose form it is.

They are of all tokens of a step, wherever they are: several processes average (or sum) what is linear in the tokens
before anything is multiplied or squared.

Legend: T tokens, E experts, k choices of a token.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.comm.exchange import GatheredExchange, LocalExchange
from parallel.operator_layout import Layout


class BalanceLoss(nn.Cell):
    """hits [T, n, E], probabilities [T, E] -> weight * E * sum_e f_e P_e.

    f_e is the share of the T n choices that fell on e (divided by n, so that sum f = 1; a constant in the gradient),
    P_e the mean probability of e over the tokens. Even routing gives `weight`. Switch's form (arXiv 2101.03961,
    equations 4 to 6) for n = 1.
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

    def construct(self, hits: Tensor, probabilities: Tensor) -> Tensor:
        choices = Tensor(float(hits.shape[0] * hits.shape[1]), ms.float32)
        share = self.exchange.mean(self.of_choices(self.count(hits, (0, 1)), choices))
        mean = self.exchange.mean(self.mean(probabilities, 0))
        return self.sum(self.mul(share, mean)) * self.factor


class PooledMeans(nn.Cell):
    """hits [T, k, E], probabilities [T, E], another loss -> [2 E + 2]: f (a constant in the gradient), P, loss, 1.

    f_e is the mean number of a token's choices that fell on e (sum f = k). Added up over layers this is what
    `PooledBalanceLoss` takes.
    """

    def __init__(self, layout: Layout, exchange: GatheredExchange | None = None) -> None:
        super().__init__()
        self.exchange = exchange or LocalExchange()
        self.count = layout(ops.ReduceSum(), (1, 1, 1))
        self.mean = layout(ops.ReduceMean(), (1, 1))
        self.concat = layout(ops.Concat(0))

    def construct(self, hits: Tensor, probabilities: Tensor, other: Tensor) -> Tensor:
        share = self.exchange.mean(self.count(hits, (0, 1)) / hits.shape[0])
        mean = self.exchange.mean(self.mean(probabilities, 0))
        one = ops.ones((1,), ms.float32)
        return self.concat((share, mean, other.reshape(1), one))


class PooledBalanceLoss(nn.Cell):
    """The sum over L layers of `PooledMeans` [2 E + 2] -> weight * E * sum_e f_e P_e, f and P their means over layers,
    plus the other losses' sum."""

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
    """logits [T, E] -> weight * mean_t (logsumexp_e logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""

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

    def construct(self, logits: Tensor) -> Tensor:
        largest = ops.stop_gradient(self.max(logits, -1))
        pooled = self.add(self.log(self.sum(self.exp(self.sub(logits, largest)), -1)), largest)
        return self.exchange.mean(self.mean(self.square(pooled)).reshape(1)).reshape(()) * self.weight


class VariationLoss(nn.Cell):
    """values [E] -> weight * CV(values)^2: population variance over squared mean (arXiv 1701.06538, equation 7)."""

    def __init__(self, weight: float, layout: Layout, exchange: GatheredExchange | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.exchange = exchange or LocalExchange()
        self.mean = layout(ops.ReduceMean(keep_dims=True), (1,))
        self.sub = layout(ops.Sub(), (1,), (1,))
        self.square = layout(ops.Square(), (1,))
        self.div = layout(ops.Div(), (1,), (1,))
        self.sum = layout(ops.ReduceSum(), (1,))

    def construct(self, values: Tensor) -> Tensor:
        values = self.exchange.total(values)
        mean = self.mean(values)
        variance = self.mean(self.square(self.sub(values, mean)))
        # The small number is that of the authors' code: a layer in which nothing was routed has loss 0.
        return self.sum(self.div(variance, self.square(mean) + 1e-10)) * self.weight
