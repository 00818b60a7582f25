"""GShard: top-2 gate whose second expert is used at random (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1)."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from rre.routers.gate import Gate, LearnedRouter
from rre.routers.losses import BalanceLoss


class GShardRouter(LearnedRouter):
    """Top-2 gate over softmax probabilities, combine weights g1, g2 renormalised over the two.

    While training, the second expert is used with probability min(1, 2 g2) of the renormalised g2; one that is not
    used takes no room. Evaluation always uses it. Room of an expert in a group of n samples: ceil(factor * 2 n S / E),
    first choices first.

    Auxiliary loss: weight * E * sum_e (c_e / S) m_e, c_e the first choices that fell on e (before dropping; a constant
    in the gradient), m_e the mean probability. The paper writes (1 / E) * sum; this is E^2 times that, the scale of
    later codes, in which a weight means what it means in Switch. f counts first choices alone: no division by k.
    """

    choices = 2

    def noise_shape(self, tokens: int) -> tuple[int, ...]:
        return (tokens,)

    def noise(self, step: int, samples: np.ndarray) -> np.ndarray:
        """float32 [T], uniform in 0 … 1: the second expert is used where it is less than 2 g2."""
        draws = self.generators("second expert", step, samples)
        return np.concatenate([draw.random(self.options.length, np.float32) for draw in draws])

    def cell(self) -> nn.Cell:
        return GShardGate(self)


class GShardGate(Gate):
    """The gate inside the graph; see `Gate`."""

    def __init__(self, router: GShardRouter) -> None:
        super().__init__(router)
        layout = router.options.layout
        self.best = layout(ops.ArgMaxWithValue(axis=-1), (1, 1))
        self.hit = layout(ops.OneHot(), (1, 1), (), ())
        self.without = layout(ops.Sub(), (1, 1), (1, 1))
        self.cast_ids = layout(ops.Cast(), (1,))
        self.pair = layout(ops.Stack(1), (1,), (1,))
        self.div = layout(ops.Div(), (1,), (1,))
        self.add = layout(ops.Add(), (1,), (1,))
        self.less = layout(ops.Less(), (1,), (1,))
        self.use = layout(ops.Select(), (1,), (1,), (1,))
        self.expand = layout(ops.ExpandDims(), (1, 1))
        self.balance = BalanceLoss(router.options.auxiliary_weight, self.experts, layout, router.options.exchange)

    def choose(self, x: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        probabilities = self.softmax(self.logits(x, self.weight))
        first, g1 = self.best(probabilities)
        first_hits = ops.stop_gradient(self.hit(first, self.experts, self.on, self.off))
        # Twice taken away, the first choice is below every other probability, zeros included.
        second, rest = self.best(self.without(probabilities, first_hits * 2.0))
        both = self.add(g1, rest)
        g1, g2 = self.div(g1, both), self.div(rest, both)
        first, second = self.cast_ids(first, ms.int32), self.cast_ids(second, ms.int32)
        if len(noise) > 0:
            used = self.less(noise[0], ops.stop_gradient(g2) * 2.0)
            second = self.use(used, second, ops.fill(ms.int32, second.shape, self.experts))
        return self.pair((first, second)), self.pair((g1, g2)), probabilities, first_hits

    def auxiliary(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        return self.balance(self.expand(chosen[3], 1), chosen[2])
