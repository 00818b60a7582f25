"""AdamW with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), in terms of MindSpore's fused operator.

`ops.AdamWeightDecay` is one pass over memory but knows no bias correction:

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr' (m / (sqrt(v) + eps') + decay' w)

With lr' = lr sqrt(1 - b2^t) / (1 - b1^t), eps' = eps sqrt(1 - b2^t) and decay' = decay lr / lr' this is
torch.optim.AdamW up to rounding. `update_in_place` is the same formula on the host, for experts kept in host memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from parallel.ops.compiled_kernels import HostKernels

DOT_BLOCK = 1 << 13  # elements of one float32 sum of squares
BLOCK = 1 << 17  # elements of one block: with its scratch it stays in a core's second-level cache


@dataclass(frozen=True)
class AdamWHyperparameters:
    """AdamW hyperparameters of one group of tensors; `learning_rate` is the step's, after schedule and factors."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    def correct_bias(self, step: int) -> tuple[float, float, float]:
        """Fold the bias correction in: (lr', eps', decay') for a tensor's `step`-th update, counted from 1."""
        second = math.sqrt(1.0 - self.beta2**step)
        learning_rate = self.learning_rate * second / (1.0 - self.beta1**step)
        decay = self.weight_decay * self.learning_rate / learning_rate if learning_rate else 0.0
        return learning_rate, self.epsilon * second, decay


def has_weight_decay(name: str) -> bool:
    """Tell whether a tensor of this name has weight decay: all but biases and the gains and shifts of norms."""
    return not name.endswith((".bias", ".gamma", ".beta"))


def update_in_place(
    weight: np.ndarray, m: np.ndarray, v: np.ndarray, gradient: np.ndarray, hyper: AdamWHyperparameters, step: int,
    scale: float, decayed: bool, kernels: HostKernels | None = None,
) -> None:  # fmt: skip
    """AdamW of one tensor on the host by gradient * `scale`, its `step`-th update; all arrays float32 of one shape.

    The first three are changed in place and must be contiguous. Block by block, so that the passes of the formula run
    in the cache; NumPy lets other threads work meanwhile. The result does not depend on the block size. `kernels` does
    it in one pass.
    """
    rate, epsilon, _ = hyper.correct_bias(step)
    kept = 1.0 - hyper.learning_rate * hyper.weight_decay
    first, second = (1.0 - hyper.beta1) * scale, math.sqrt(1.0 - hyper.beta2) * scale
    if kernels is not None:
        kept = kept if decayed else 1.0
        kernels.adamw(weight, m, v, gradient, hyper.beta1, hyper.beta2, first, second, rate, epsilon, kept)
        return
    flat = [a.reshape(-1) for a in (weight, m, v, gradient)]
    scratch = np.empty(min(BLOCK, flat[0].size), np.float32)
    for start in range(0, flat[0].size, BLOCK):
        w, m, v, g = (a[start : start + BLOCK] for a in flat)
        t = scratch[: g.size]
        np.multiply(g, first, out=t)
        np.multiply(m, hyper.beta1, out=m)
        np.add(m, t, out=m)
        np.multiply(g, second, out=t)
        np.multiply(t, t, out=t)
        np.multiply(v, hyper.beta2, out=v)
        np.add(v, t, out=v)
        np.sqrt(v, out=t)
        np.add(t, epsilon, out=t)
        np.divide(m, t, out=t)
        np.multiply(t, rate, out=t)
        if decayed:
            np.multiply(w, kept, out=w)
        np.subtract(w, t, out=w)


def square_sum(values: np.ndarray) -> float:
    """Sum of squares of a contiguous float32 array, in float32 inside a block and float64 over blocks."""
    flat = values.reshape(-1)
    # Blocks this small never meet BLAS's own threads, so the order of the sum is the same on every machine.
    blocks = (flat[start : start + DOT_BLOCK] for start in range(0, flat.size, DOT_BLOCK))
    return sum(float(np.dot(block, block)) for block in blocks)
