"""The field's learned gates in NumPy float64, written from the papers' formulas, a few lines each, tokens one by one.

Each returns `Routed`. Legend: T tokens, D hidden width, E experts, k choices of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Routed:
    """weights [T, E]: what a token takes of each expert before dropping, 0 of the others; `order`: its experts, best
    first; the weighted auxiliary loss."""

    weights: Array
    order: list[list[int]]
    auxiliary: float


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def switch(x: Array, gate: Array, weight: float, jitter: Array | None = None) -> Routed:
    """2101.03961, equations 4 to 6."""
    p = softmax((x if jitter is None else x * jitter) @ gate)
    order = [[int(row.argmax())] for row in p]
    f = np.bincount([o[0] for o in order], minlength=p.shape[1]) / len(p)
    return Routed(_chosen(p, order), order, weight * p.shape[1] * float(f @ p.mean(0)))


def gshard(x: Array, gate: Array, weight: float, draw: Array | None = None) -> Routed:
    """2006.16668, algorithm 1; `draw` [T] uniform, None: the second expert is always used. E^2 times its loss."""
    p = softmax(x @ gate)
    experts = p.shape[1]
    order, weights = [], np.zeros_like(p)
    for t, row in enumerate(p):
        first, second = np.argsort(-row, kind="stable")[:2]
        g1, g2 = row[[first, second]] / row[[first, second]].sum()
        weights[t, first] = g1
        order.append([int(first)])
        if draw is None or 2 * g2 > draw[t]:
            weights[t, second] = g2
            order[-1].append(int(second))
    c = np.bincount([o[0] for o in order], minlength=experts)
    paper = (1 / experts) * float((c / len(p)) @ p.mean(0))
    return Routed(weights, order, weight * experts**2 * paper)


def noisy_top_k(
    x: Array, gate: Array, noise_gate: Array, k: int, importance: float, load: float, noise: Array | None = None
) -> Routed:
    """1701.06538, equations 3 to 11; `noise` [T, E] standard normal, None: h = x W_g and load is a count."""
    clean = x @ gate
    deviation = np.log1p(np.exp(x @ noise_gate))
    h = clean if noise is None else clean + noise * deviation
    order = [[int(e) for e in np.argsort(-row, kind="stable")[:k]] for row in h]
    weights = np.zeros_like(h)
    for t, chosen in enumerate(order):
        weights[t, chosen] = softmax(h[t, chosen])
    loads = (weights > 0).sum(0).astype(float)
    if noise is not None:
        loads = np.zeros(h.shape[1])
        for t, i in np.ndindex(h.shape):
            kth = np.sort(np.delete(h[t], i))[-k]
            loads[i] += 0.5 * (1 + math.erf((clean[t, i] - kth) / deviation[t, i] / math.sqrt(2)))

    def cv2(values: Array) -> float:
        return float(values.var() / values.mean() ** 2)

    return Routed(weights, order, importance * cv2(weights.sum(0)) + load * cv2(loads))


def olmoe(x: Array, gate: Array, k: int, weight: float, z_weight: float, renormalise: bool) -> Routed:
    """2409.02060; f over all T k choices."""
    logits = x @ gate
    p = softmax(logits)
    order = [[int(e) for e in np.argsort(-row, kind="stable")[:k]] for row in p]
    weights = _chosen(p, order)
    f = np.bincount(np.ravel(order), minlength=p.shape[1]) / (len(p) * k)
    z = float((np.log(np.exp(logits).sum(1)) ** 2).mean())
    if renormalise:
        weights = weights / weights.sum(1, keepdims=True)
    return Routed(weights, order, weight * p.shape[1] * float(f @ p.mean(0)) + z_weight * z)


def expert_choice(x: Array, gate: Array, taken: int, length: int) -> Routed:
    """2202.09368: of every `length` tokens each expert takes the `taken` with its largest probability."""
    p = softmax(x @ gate)
    order: list[list[int]] = [[] for _ in p]
    for start in range(0, len(p), length):
        for e in range(p.shape[1]):
            for t in np.argsort(-p[start : start + length, e], kind="stable")[:taken]:
                order[start + t].append(e)
    return Routed(_chosen(p, order), order, 0.0)


def adaptive_mixture(x: Array, gate: Array) -> Routed:
    """Jacobs et al. 1991: softmax shares, every expert takes every token."""
    p = softmax(x @ gate)
    return Routed(p, [list(range(p.shape[1])) for _ in p], 0.0)


def competitive_loss(shares: Array, losses: Array) -> Array:
    """Equation 1.3 of the paper for the losses [T, E] of each expert by itself: -log sum_i p_i exp(-loss_i), [T]."""
    return -np.log((shares * np.exp(-losses)).sum(1))


def kept(order: list[list[int]], experts: int, length: int, capacity: int | None) -> list[list[int]]:
    """The choices that find room: an expert takes `capacity` rows of every `length` tokens, first choices first."""
    if capacity is None:
        return [list(o) for o in order]
    found: list[list[int]] = [[] for _ in order]
    for start in range(0, len(order), length):
        room = [capacity] * experts
        for choice in range(max(map(len, order))):
            for t in range(start, start + length):
                if choice < len(order[t]) and room[order[t][choice]] > 0:
                    room[order[t][choice]] -= 1
                    found[t].append(order[t][choice])
    return found


def _chosen(p: Array, order: list[list[int]]) -> Array:
    weights = np.zeros_like(p)
    for t, experts in enumerate(order):
        weights[t, experts] = p[t, experts]
    return weights
