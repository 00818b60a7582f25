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

    def cell(self) -> nn.Cell:
        return EveryExpertGate(self)


class EveryExpertGate(Gate):
    """Soft gate over all experts inside the graph; see `Gate`.

    The combine weights [T, E] are p, or log p with `log_weights`. Where it is asked for its choices it returns the
    expert with the largest p, because the choices themselves are always all.
    """

    def __init__(self, router: EveryExpertRouter) -> None:
        super().__init__(router)
        layout = router.options.layout
        self.log_weights = router.options.log_weights
        self.log_softmax = layout(ops.LogSoftmax(-1), (1, 1))
        self.best = layout(ops.ArgMaxWithValue(axis=-1), (1, 1))

    def choose(self, x_TD: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits_TE = self.logits(x_TD, self.weight)
        ids_TE = ops.BroadcastTo((x_TD.shape[0], self.experts))(ops.arange(0, self.experts, 1, dtype=ms.int32))
        return ids_TE, self.log_softmax(logits_TE) if self.log_weights else self.softmax(logits_TE)

    def auxiliary(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> Tensor:
        return Tensor(0.0, ms.float32)

    def assignments(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        best_T, _ = self.best(chosen[1])
        return self.sum(self.one_hot(best_T.reshape(-1, 1), self.experts, self.on, self.off), 1)
