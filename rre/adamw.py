"""AdamW with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), in terms of MindSpore's fused operator.

`ops.AdamWeightDecay` is one pass over memory but knows no bias correction:

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr' (m / (sqrt(v) + eps') + decay' w)

With lr' = lr sqrt(1 - b2^t) / (1 - b1^t), eps' = eps sqrt(1 - b2^t) and decay' = decay lr / lr' this is
torch.optim.AdamW up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AdamWHyper:
    """Hyper-parameters of one group of tensors; `learning_rate` is the step's, after schedule and factors."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    def corrected(self, step: int) -> tuple[float, float, float]:
        """(lr', eps', decay') for a tensor's `step`-th update, counted from 1."""
        second = math.sqrt(1.0 - self.beta2**step)
        learning_rate = self.learning_rate * second / (1.0 - self.beta1**step)
        decay = self.weight_decay * self.learning_rate / learning_rate if learning_rate else 0.0
        return learning_rate, self.epsilon * second, decay


def decays(name: str) -> bool:
    """Whether a tensor of this name has weight decay: all but biases and the gains and shifts of norms."""
    return not name.endswith((".bias", ".gamma", ".beta"))
