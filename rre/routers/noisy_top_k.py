"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, sections 2.1, 4 and appendix A)."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

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
    """Noisy top-k gate inside the graph; see `Gate`. Raises ValueError unless k is less than the number of experts."""

    def __init__(self, router: NoisyTopKRouter) -> None:
        super().__init__(router)
        options, layout = router.options, router.options.layout
        if self.choices >= self.experts:
            raise ValueError(f"noisy top-{self.choices} needs more than {self.experts} experts")
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
        self.importance = VariationLoss(options.setting("importance_loss_weight"), layout, options.exchange)
        self.load = VariationLoss(options.setting("load_loss_weight"), layout, options.exchange)

    def choose(self, x_TD: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        clean_TE = self.logits(x_TD, self.weight)
        h_TE = clean_TE
        deviation = ()
        if len(noise) > 0:
            deviation = (self.softplus(self.logits(x_TD, self.noise_weight)),)
            h_TE = self.add(clean_TE, self.product(noise[0], deviation[0]))
        # One more than is chosen: the first that is not.
        _, order_TK1 = self.top(ops.stop_gradient(h_TE), self.choices + 1)
        largest_TK1 = self.take(h_TE, 1, order_TK1)
        tokens = x_TD.shape[0]
        ids_TK = self.cut(order_TK1, (0, 0), (tokens, self.choices))
        weights_TK = self.softmax(self.cut(largest_TK1, (0, 0), (tokens, self.choices)))
        return (ids_TK, weights_TK, clean_TE, largest_TK1) + deviation

    def auxiliary(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> Tensor:
        weights_TK, clean_TE, largest_TK1 = chosen[1], chosen[2], chosen[3]
        gates_TE = self.sum(self.mul(hits_TKE, self.expand(weights_TK, 2)), 1)
        importance = self.importance(self.total(gates_TE, 0))
        inside_TE = self.sum(hits_TKE, 1)
        if len(chosen) < 5:
            return importance + self.load(self.total(inside_TE, 0))
        tokens = clean_TE.shape[0]
        last_in_T1 = self.cut(largest_TK1, (0, self.choices - 1), (tokens, 1))
        first_out_T1 = self.cut(largest_TK1, (0, self.choices), (tokens, 1))
        # The k-th largest without i: one further down where i itself is among the k.
        if_inside_TE = self.product(inside_TE, first_out_T1)
        threshold_TE = self.add(if_inside_TE, self.product(self.missing(self.on, inside_TE), last_in_T1))
        z_TE = self.div(self.sub(clean_TE, threshold_TE), chosen[4])
        normal_TE = self.times(self.plus(self.erf(self.times(z_TE, self.root_half)), self.on), self.half)
        if len(text) > 0:
            normal_TE = self.product(normal_TE, text[0])
        return importance + self.load(self.total(normal_TE, 0))
