"""Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan and Hinton 1991, Neural Computation 3, pages 79 to 87)."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from rre.routers.learned_gate import Gate, LearnedRouter
from rre.routers.router import RouterOptions


class AdaptiveMixtureRouter(LearnedRouter):
    """Every expert computes every token; p = softmax(x W_g) over all E experts says how much each one counts.

    The mixture is of what a whole model would give, so it stands in the top layer alone. Two losses, the paper's error
    of a desired vector written as the likelihood of the next token. Cooperative (its equation 1.1): -log of the
    likelihood under the blended output h + sum_i p_i y_i; the combine weights are p. Competitive (its equation 1.3):
    -log sum_i p_i likelihood_i, every expert scored by itself with the output h + y_i; nothing is blended (`apart`),
    the combine weights are log p, and whoever owns the head mixes the likelihoods. There is no auxiliary loss: the
    competition itself divides the tokens among the experts. Nothing is dropped.
    """

    def __init__(self, options: RouterOptions) -> None:
        super().__init__(options)
        self.apart = options.competitive

    @property
    def choices(self) -> int:
        return self.options.groups.total

    def cell(self) -> nn.Cell:
        return AdaptiveMixtureGate(self)


class AdaptiveMixtureGate(Gate):
    """The gate inside the graph; see `Gate`. The combine weights are p, or log p of a competitive mixture. Of its
    choices it tells the expert with the largest share, because all of them tell nothing."""

    def __init__(self, router: AdaptiveMixtureRouter) -> None:
        super().__init__(router)
        layout = router.options.layout
        self.logarithms = router.apart
        self.log_softmax = layout(ops.LogSoftmax(-1), (1, 1))
        self.best = layout(ops.ArgMaxWithValue(axis=-1), (1, 1))

    def choose(self, x: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = self.logits(x, self.weight)
        ids = ops.BroadcastTo((x.shape[0], self.experts))(ops.arange(0, self.experts, 1, dtype=ms.int32))
        return ids, self.log_softmax(logits) if self.logarithms else self.softmax(logits)

    def auxiliary(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        return Tensor(0.0, ms.float32)

    def told(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        leader, _ = self.best(chosen[1])
        return self.sum(self.one_hot(leader.reshape(-1, 1), self.experts, self.on, self.off), 1)
