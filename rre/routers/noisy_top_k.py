"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, sections 2.1, 4 and appendix A)."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from rre.routers.auxiliary_losses import VariationLoss
from rre.routers.learned_gate import Gate, LearnedRouter


class NoisyTopKRouter(LearnedRouter):
    """h_i = (x W_g)_i + N(0, 1) * softplus((x W_noise)_i) while training, x W_g in evaluation; the gate is the softmax
    over the k largest h, whose values are the combine weights.

    Auxiliary loss: importance weight * CV(importance)^2 + load weight * CV(load)^2 (the paper's equations 6 to 11).
    importance_i is the sum of i's gate values over the tokens; load_i = sum over tokens of Phi((x W_g)_i - (k-th
    largest h without i)) / softplus((x W_noise)_i)), the smooth count of tokens sent to i. No share is divided by k: CV
    has no scale. Evaluation has no noise, so there load is the count itself.
    """

    def noise_shape(self, tokens: int) -> tuple[int, ...]:
        return tokens, self.options.groups.total

    def noise(self, step: int, samples: np.ndarray) -> np.ndarray:
        """float32 [T, E], standard normal."""
        shape = self.options.length, self.options.groups.total
        draws = self.generators("gate noise", step, samples)
        return np.concatenate([draw.standard_normal(shape, np.float32) for draw in draws])

    def cell(self) -> nn.Cell:
        return NoisyTopKGate(self)


class NoisyTopKGate(Gate):
    """The gate inside the graph; see `Gate`. Raises ValueError unless k is less than the number of experts."""

    def __init__(self, router: NoisyTopKRouter) -> None:
        super().__init__(router)
        options, layout = router.options, router.options.layout
        if self.choices >= self.experts:
            raise ValueError(f"noisy top-{self.choices} needs more than {self.experts} experts")
        self.noise_weight = Parameter(initializer("zeros", self.weight.shape), name="noise_weight")
        two = ("rows", 1)
        self.top = layout(ops.TopK(sorted=True), two)
        self.take = layout(ops.GatherD(), two, two)
        self.cut = layout(ops.Slice(), two)
        self.softplus = layout(ops.Softplus(), two)
        self.erf = layout(ops.Erf(), two)
        self.product = layout(ops.Mul(), two, two)
        self.add = layout(ops.Add(), two, two)
        self.div = layout(ops.Div(), two, two)
        self.total = layout(ops.ReduceSum(), two)
        self.expand = layout(ops.ExpandDims(), two)
        self.missing = layout(ops.Sub(), (), two)
        self.times = layout(ops.Mul(), two, ())
        self.plus = layout(ops.Add(), two, ())
        self.root_half, self.half = Tensor(math.sqrt(0.5), ms.float32), Tensor(0.5, ms.float32)
        self.importance = VariationLoss(options.importance_weight, layout, options.exchange)
        self.load = VariationLoss(options.load_weight, layout, options.exchange)

    def choose(self, x: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        clean = self.logits(x, self.weight)
        h = clean
        deviation = ()
        if len(noise) > 0:
            deviation = (self.softplus(self.logits(x, self.noise_weight)),)
            h = self.add(clean, self.product(noise[0], deviation[0]))
        # One more than is chosen: the first that is not.
        _, order = self.top(ops.stop_gradient(h), self.choices + 1)
        largest = self.take(h, 1, order)
        tokens = x.shape[0]
        ids = self.cut(order, (0, 0), (tokens, self.choices))
        weights = self.softmax(self.cut(largest, (0, 0), (tokens, self.choices)))
        return (ids, weights, clean, largest) + deviation

    def auxiliary(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        weights, clean, largest = chosen[1], chosen[2], chosen[3]
        gates = self.sum(self.mul(hits, self.expand(weights, 2)), 1)
        importance = self.importance(self.total(gates, 0))
        inside = self.sum(hits, 1)
        if len(chosen) < 5:
            return importance + self.load(self.total(inside, 0))
        tokens = clean.shape[0]
        last_in = self.cut(largest, (0, self.choices - 1), (tokens, 1))
        first_out = self.cut(largest, (0, self.choices), (tokens, 1))
        # The k-th largest without i: one further down where i itself is among the k.
        threshold = self.add(self.product(inside, first_out), self.product(self.missing(self.on, inside), last_in))
        z = self.div(self.sub(clean, threshold), chosen[4])
        normal = self.times(self.plus(self.erf(self.times(z, self.root_half)), self.on), self.half)
        return importance + self.load(self.total(normal, 0))
