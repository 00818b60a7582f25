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

from rre.counted_random import generator
from rre.dispatch.capacity_in_graph import CapacityPlanInGraph
from rre.dispatch.dispatch_plan import build_plan_cell
from rre.routers.router import Router, RouterOptions


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

    With `return_assignments`, set before compiling, the last is the hits [T, E], 1 where a token takes an expert.
    Room goes to first choices before second ones, then in token order (arXiv 2006.16668, algorithm 1); a choice
    without room takes the residual alone. Gates compute in float32. In a graph that is cut over a mesh each rank gates
    its own tokens, with a copy of the weight, and plans reserved rows (`rre.dispatch.capacity_dispatch`).
    """

    def __init__(self, router: LearnedRouter) -> None:
        super().__init__()
        options = router.options
        layout = options.layout
        self.experts, self.choices, self.length = options.groups.total, router.choices, options.length
        self.capacity, self.group = router.capacity, router.group
        shape = (options.hidden, self.experts)
        self.weight = Parameter(initializer(Normal(options.init_std), shape), name="weight")
        two, three, four = (("rows", *(1,) * n) for n in (1, 2, 3))
        self.logits = layout(ops.MatMul(), two, (1, 1))
        self.softmax = layout(ops.Softmax(-1), two)
        self.one_hot = layout(ops.OneHot(), three, (), ())
        self.cumulative = layout(ops.CumSum(), three)
        self.turn = layout(ops.Transpose(), four)
        self.less_equal = layout(ops.LessEqual(), three, ())
        self.mul = layout(ops.Mul(), three, three)
        self.sub = layout(ops.Sub(), two, two)
        self.cast = layout(ops.Cast(), three)
        self.sum = layout(ops.ReduceSum(), three)
        self.overflow_sum = layout(ops.ReduceSum(keep_dims=True), two)
        self.of_choices = layout(ops.Div(), two, ())
        self.concat = layout(ops.Concat(1), two, two)
        self.greater = layout(ops.Greater(), two, ())
        self.select = layout(ops.Select(), two, two, two)
        self.is_cut = layout.spmd_mesh is not None
        if self.is_cut:
            cut = (layout, layout.spmd_mesh, self.experts, self.group)
            self.plan_by_capacity = CapacityPlanInGraph(*cut, self.capacity)
            # A token chooses an expert at most once, so with room for all of a group's tokens nothing is dropped.
            self.plan_all = CapacityPlanInGraph(*cut, self.group)
            self.room_for_all = Tensor(float(self.group), ms.float32)
        else:
            self.plan = build_plan_cell(self.experts, layout, options.exchange)
        self.return_assignments = False
        self.choices_of_token = Tensor(float(self.choices), ms.float32)
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
        if self.capacity is not None:
            self.room = Tensor(float(self.capacity), ms.float32)

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
        if self.is_cut and self.training:
            hits, number = self.with_room(hits, self.room)
            kept = self.rows(hits)
            plan = self.plan_by_capacity(hits, number)
        elif self.is_cut:
            hits, number = self.with_room(hits, self.room_for_all)
            plan = self.plan_all(hits, number)
        elif self.training and self.capacity is not None:
            hits, _ = self.with_room(hits, self.room)
            kept = self.rows(hits)
            has_room = self.greater(self.sum(hits, 2), self.off)
            plan = self.plan(self.select(has_room, ids, ops.fill(ms.int32, ids.shape, self.experts)))
        else:
            plan = self.plan(ids)
        if self.return_assignments:
            return plan, chosen[1], auxiliary, self.assignments(hits, chosen)
        lost = self.of_choices(self.overflow_sum(self.sub(wanted, kept), 1), self.choices_of_token)
        return plan, chosen[1], auxiliary, self.concat((kept, lost))

    def assignments(self, hits: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        """The hits [T, E] of `return_assignments`."""
        return self.sum(hits, 1)

    def rows(self, hits: Tensor) -> Tensor:
        """Rows of every sample and expert [B, E]."""
        return self.sum(hits.reshape(-1, self.length * self.choices, self.experts), 1)

    def with_room(self, hits: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """`hits` [T, k, E] without the choices that found no `room` with their expert, and which of its group's choices
        of the expert each was, counted from 1 [T, k, E]."""
        ordered = hits.reshape(-1, self.group, self.choices, self.experts)
        if self.choices > 1:
            ordered = self.turn(ordered, (0, 2, 1, 3))
        ordered = ordered.reshape(-1, self.group * self.choices, self.experts)
        number = self.cumulative(ordered, 1)
        if self.choices > 1:
            number = self.turn(number.reshape(-1, self.choices, self.group, self.experts), (0, 2, 1, 3))
        number = number.reshape(hits.shape)
        has_room = self.less_equal(number, room)
        return self.mul(hits, self.cast(has_room, ms.float32)), number
