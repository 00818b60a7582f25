"""What learned gates in which tokens choose experts share: choices, room, plan and counts.

A gate of its own says how it chooses (`choose`) and what it adds to the loss (`auxiliary`).

Legend: T tokens of B samples of S, n samples of a dispatch group, D hidden width, E experts of the layer, k choices of
a token.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from rre.counted import generator
from rre.dispatch import plan_in_graph
from rre.routers.base import Router, RouterOptions


class LearnedRouter(Router):
    """A router whose gate, weight [D, E], chooses among all experts of the layer, inside the graph."""

    learned = True

    def __init__(self, options: RouterOptions) -> None:
        self.options = options

    @classmethod
    def build(cls, options: RouterOptions) -> LearnedRouter:
        return cls(options)

    @property
    def choices(self) -> int:
        """k."""
        return self.options.top_k

    @property
    def group(self) -> int:
        """Tokens that share an expert's room: n S."""
        return self.options.capacity_samples * self.options.length

    @property
    def capacity(self) -> int | None:
        """Rows that an expert takes of a group of n samples while training: ceil(factor * k n S / E); None = all.
        Evaluation never drops."""
        if self.options.capacity_factor is None:
            return None
        even = self.choices * self.group / self.options.groups.total
        return math.ceil(self.options.capacity_factor * even)

    def generators(self, purpose: str, step: int, samples: np.ndarray) -> list[np.random.Generator]:
        """One counted generator for each of `samples` [B]."""
        return [generator(self.options.seed, purpose, step, int(n), self.options.layer) for n in samples]


class Gate(nn.Cell):
    """x_TD, (noise,) or () -> (plan, combine weights [T, k], auxiliary loss, rows [B, E + 1]).

    With `tells_choices` the last is the hits [T, E] instead, 1 where a token takes an expert (set it before compiling).
    Room goes to first choices before second ones, then in token order (arXiv 2006.16668, algorithm 1); a choice
    without room takes the residual alone. Gates compute in float32.
    """

    def __init__(self, router: LearnedRouter) -> None:
        super().__init__()
        options = router.options
        layout = options.layout
        self.experts, self.choices, self.length = options.groups.total, router.choices, options.length
        self.capacity, self.group = router.capacity, router.group
        shape = (options.hidden, self.experts)
        self.weight = Parameter(initializer(Normal(options.init_std), shape), name="weight")
        self.logits = layout(ops.MatMul(), (1, 1), (1, 1))
        self.softmax = layout(ops.Softmax(-1), (1, 1))
        self.one_hot = layout(ops.OneHot(), (1, 1, 1), (), ())
        self.cumulative = layout(ops.CumSum(), (1, 1, 1))
        self.turn = layout(ops.Transpose(), (1, 1, 1, 1))
        self.less_equal = layout(ops.LessEqual(), (1, 1, 1), ())
        self.mul = layout(ops.Mul(), (1, 1, 1), (1, 1, 1))
        self.sub = layout(ops.Sub(), (1, 1), (1, 1))
        self.cast = layout(ops.Cast(), (1, 1))
        self.sum = layout(ops.ReduceSum(), (1, 1, 1))
        self.overflow_sum = layout(ops.ReduceSum(keep_dims=True), (1, 1))
        self.concat = layout(ops.Concat(1), (1, 1), (1, 1))
        self.select = layout(ops.Select(), (1, 1), (1, 1), (1, 1))
        self.plan = plan_in_graph(self.experts, layout, options.exchange)
        self.tells_choices = False
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def choose(self, x: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(expert ids int32 [T, k], E for a choice that is not made; combine weights [T, k]; what `auxiliary` needs).

        Without noise it chooses as evaluation does.
        """
        raise NotImplementedError

    def auxiliary(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        """The weighted auxiliary loss of `hits` [T, k, E] (1 where a choice fell on an expert, before dropping)."""
        raise NotImplementedError

    def construct(self, x: Tensor, routing: tuple[Tensor, ...]):
        chosen = self.choose(x, routing)
        ids = chosen[0]
        hits = ops.stop_gradient(self.one_hot(ids, self.experts, self.on, self.off))
        auxiliary = self.auxiliary(hits, chosen)
        wanted = self.rows(hits)
        kept = wanted
        # Evaluation drops nothing, whatever training does.
        if self.training and self.capacity is not None:
            hits = self.with_room(hits)
            kept = self.rows(hits)
            ids = self.select(self.sum(hits, 2) > 0.0, ids, ops.fill(ms.int32, ids.shape, self.experts))
        if self.tells_choices:
            return self.plan(ids), chosen[1], auxiliary, self.told(hits, chosen)
        lost = self.overflow_sum(self.sub(wanted, kept), 1) / self.choices
        return self.plan(ids), chosen[1], auxiliary, self.concat((kept, lost))

    def told(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        """The hits [T, E] of `tells_choices`."""
        return self.sum(hits, 1)

    def rows(self, hits: Tensor) -> Tensor:
        """Rows of every sample and expert [B, E]."""
        return self.sum(hits.reshape(-1, self.length * self.choices, self.experts), 1)

    def with_room(self, hits: Tensor) -> Tensor:
        """`hits` [T, k, E] without the choices that found their expert full."""
        ordered = hits.reshape(-1, self.group, self.choices, self.experts)
        if self.choices > 1:
            ordered = self.turn(ordered, (0, 2, 1, 3))
        ordered = ordered.reshape(-1, self.group * self.choices, self.experts)
        rank = self.cumulative(ordered, 1)
        ordered = self.mul(ordered, self.cast(self.less_equal(rank, float(self.capacity)), ms.float32))
        if self.choices > 1:
            ordered = self.turn(ordered.reshape(-1, self.choices, self.group, self.experts), (0, 2, 1, 3))
        return ordered.reshape(hits.shape)
