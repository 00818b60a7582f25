"""Soft gate over all experts: every expert takes every token, and p = softmax(x W_g) says how much each one counts.

It is the gate of adaptive mixtures of local experts (Jacobs, Jordan, Nowlan and Hinton 1991, Neural Computation 3,
pages 79 to 87); what is mixed by p is the caller's business.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from rre.routers.learned_gate import Gate, LearnedRouter


class EveryExpertRouter(LearnedRouter):
    """Router of `EveryExpertGate`: k is E, nothing is dropped, and there is no auxiliary loss."""

    @property
    def choices(self) -> int:
        return self.options.groups.total

    def cell(self) -> nn.Cell:
        return EveryExpertGate(self)


class EveryExpertGate(Gate):
    """The gate inside the graph; see `Gate`. The combine weights [T, E] are p, or log p with `log_weights`. Where it is
    asked for its choices it returns the expert with the largest p, because the choices themselves are always all."""

    def __init__(self, router: EveryExpertRouter) -> None:
        super().__init__(router)
        layout = router.options.layout
        self.log_weights = router.options.log_weights
        self.log_softmax = layout(ops.LogSoftmax(-1), (1, 1))
        self.best = layout(ops.ArgMaxWithValue(axis=-1), (1, 1))

    def choose(self, x: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = self.logits(x, self.weight)
        ids = ops.BroadcastTo((x.shape[0], self.experts))(ops.arange(0, self.experts, 1, dtype=ms.int32))
        return ids, self.log_softmax(logits) if self.log_weights else self.softmax(logits)

    def auxiliary(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        return Tensor(0.0, ms.float32)

    def assignments(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        leader, _ = self.best(chosen[1])
        return self.sum(self.one_hot(leader.reshape(-1, 1), self.experts, self.on, self.off), 1)
