"""GShard: top-2 gate whose second expert is used at random (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1)."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from rre.routers.auxiliary_losses import BalanceLoss
from rre.routers.learned_gate import Gate, LearnedRouter


class GShardRouter(LearnedRouter):
    """Top-2 gate over softmax probabilities, combine weights g1, g2 renormalised over the two.

    While training, the second expert is used with probability min(1, 2 g2) of the renormalised g2; one that is not
    used takes no room. Evaluation always uses it. Room of an expert in a group of n samples: ceil(factor * 2 n S / E),
    first choices first.

    Auxiliary loss: weight * E * sum_e (c_e / S) m_e, c_e the first choices that fell on e (before dropping; a constant
    in the gradient), m_e the mean probability. The paper writes (1 / E) * sum; this is E^2 times that, the scale of
    later codes, in which a weight means what it means in Switch. f counts first choices alone: no division by k.
    """

    def noise_shape(self, tokens: int) -> tuple[int, ...]:
        return (tokens,)

    def noise(self, step: int, samples: np.ndarray) -> np.ndarray:
        """float32 [T], uniform in 0 … 1: the second expert is used where it is less than 2 g2."""
        draws = self.generators("second expert", step, samples)
        return np.concatenate([draw.random(self.options.length, np.float32) for draw in draws])

    def cell(self) -> nn.Cell:
        return GShardGate(self)


class GShardGate(Gate):
    """GShard top-2 gate inside the graph; see `Gate`."""

    def __init__(self, router: GShardRouter) -> None:
        super().__init__(router)
        options, layout = router.options, router.options.layout
        one, two = ("rows",), ("rows", 1)
        self.best = layout(ops.ArgMaxWithValue(axis=-1), two)
        self.hit = layout(ops.OneHot(), two, (), ())
        self.without = layout(ops.Sub(), two, two)
        self.twice_all = layout(ops.Mul(), two, ())
        self.twice = layout(ops.Mul(), one, ())
        self.cast_ids = layout(ops.Cast(), one)
        self.pair = layout(ops.Concat(1), two, two)
        self.column = layout(ops.ExpandDims(), one)
        self.div = layout(ops.Div(), one, one)
        self.add = layout(ops.Add(), one, one)
        self.less = layout(ops.Less(), one, one)
        self.use = layout(ops.Select(), one, one, one)
        self.nobody = layout(ops.Add(), one, ())
        self.nothing = layout(ops.Mul(), one, ())
        self.none = Tensor(self.experts, ms.int32)
        self.zero = Tensor(0, ms.int32)
        self.two = Tensor(2.0, ms.float32)
        self.expand = layout(ops.ExpandDims(), two)
        self.balance = BalanceLoss(options.setting("aux_loss_weight"), self.experts, layout, options.exchange)

    def choose(self, x_TD: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        probs_TE = self.softmax(self.logits(x_TD, self.weight))
        first_T, g1_T = self.best(probs_TE)
        first_hits_TE = ops.stop_gradient(self.hit(first_T, self.experts, self.on, self.off))
        # Twice taken away, the first choice is below every other probability, zeros included.
        second_T, rest_T = self.best(self.without(probs_TE, self.twice_all(first_hits_TE, self.two)))
        both_T = self.add(g1_T, rest_T)
        g1_T, g2_T = self.div(g1_T, both_T), self.div(rest_T, both_T)
        first_T, second_T = self.cast_ids(first_T, ms.int32), self.cast_ids(second_T, ms.int32)
        if len(noise) > 0:
            used_T = self.less(noise[0], self.twice(ops.stop_gradient(g2_T), self.two))
            second_T = self.use(used_T, second_T, self.nobody(self.nothing(second_T, self.zero), self.none))
        ids_TK = self.pair((self.column(first_T, 1), self.column(second_T, 1)))
        weights_TK = self.pair((self.column(g1_T, 1), self.column(g2_T, 1)))
        return ids_TK, weights_TK, probs_TE, first_hits_TE

    def auxiliary(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> Tensor:
        first_hits_TE = self.of_text(chosen[3], text[0]) if len(text) > 0 else chosen[3]
        return self.balance(self.expand(first_hits_TE, 1), chosen[2], text)
