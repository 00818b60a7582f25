"""Switch: a learned top-1 gate over all experts of the layer (Fedus et al. 2021, arXiv 2101.03961)."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from rre.routers.auxiliary_losses import BalanceLoss
from rre.routers.learned_gate import Gate, LearnedRouter


class SwitchRouter(LearnedRouter):
    """Top-1 gate: output scaled by the expert's probability; auxiliary loss weight * E * sum_e f_e P_e.

    f_e is the fraction of tokens sent to e (before dropping; a constant in the gradient), P_e the mean probability
    (arXiv 2101.03961, equations 4 to 6; k = 1, so no question of dividing f by k). `jitter` is the half-width of the
    uniform noise around 1 that multiplies the gate's input while training.
    """

    def noise_shape(self, tokens: int) -> tuple[int, ...]:
        return (tokens, self.options.hidden) if self.options.setting("jitter") > 0 else ()

    def noise(self, step: int, samples: np.ndarray) -> np.ndarray:
        """float32 [T, D], uniform in 1 - jitter … 1 + jitter."""
        half, shape = self.options.setting("jitter"), (self.options.length, self.options.hidden)
        rows = [draw.uniform(1 - half, 1 + half, shape) for draw in self.generators("jitter", step, samples)]
        return np.concatenate(rows).astype(np.float32)

    def cell(self) -> nn.Cell:
        return SwitchGate(self)


class SwitchGate(Gate):
    """Switch top-1 gate inside the graph; see `Gate`."""

    def __init__(self, router: SwitchRouter) -> None:
        super().__init__(router)
        options, layout = router.options, router.options.layout
        self.best = layout(ops.ArgMaxWithValue(axis=-1), ("rows", 1))
        self.cast_ids = layout(ops.Cast(), ("rows",))
        self.shake = layout(ops.Mul(), ("rows", 1), ("rows", 1))
        self.balance = BalanceLoss(options.setting("aux_loss_weight"), self.experts, layout, options.exchange)

    def choose(self, x_TD: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate_input_TD = self.shake(x_TD, noise[0]) if len(noise) > 0 else x_TD
        probs_TE = self.softmax(self.logits(gate_input_TD, self.weight))
        best_T, prob_T = self.best(probs_TE)
        return self.cast_ids(best_T, ms.int32).reshape(-1, 1), prob_T.reshape(-1, 1), probs_TE

    def auxiliary(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> Tensor:
        return self.balance(hits_TKE, chosen[2], text)
