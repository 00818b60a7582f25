"""Learned gates (top-k routers): base classes of routers whose tokens choose among all experts of the layer.

The base class applies expert capacity, plans the dispatch and counts rows; a gate says how it chooses (`choose`) and
what it adds to the loss (`auxiliary`).

Legend: T tokens of B samples of S, n samples of a dispatch group, D hidden width, E experts of the layer, K choices per
token (top-k).
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Constant, Normal, initializer

from rre.counted_random import generator
from rre.dispatch.capacity_in_graph import CapacityPlanInGraph
from rre.dispatch.dispatch_plan import build_plan_cell
from rre.routers.router import Router, RouterOptions


class LearnedRouter(Router):
    """Router with a learned gate: its weight [D, E] scores all experts of the layer, inside the graph."""

    @property
    def choices(self) -> int:
        """K, the experts per token."""
        return self.options.top_k

    @property
    def group(self) -> int:
        """Tokens of a dispatch group, for which an expert has one capacity: n S."""
        return self.options.capacity_samples * self.options.length

    @property
    def capacity(self) -> int | None:
        """Expert capacity of a dispatch group while training: ceil(factor * K n S / E) rows; None = dropless.

        Evaluation never drops.
        """
        if self.options.capacity_factor is None:
            return None
        even = self.choices * self.group / self.options.groups.total
        return math.ceil(self.options.capacity_factor * even)

    def generators(self, purpose: str, step: int, samples: np.ndarray) -> list[np.random.Generator]:
        """One counted generator for each of `samples` [B]."""
        return [generator(self.options.seed, purpose, step, int(n), self.options.layer) for n in samples]


def add_gate_weights(gate: nn.Cell, options: RouterOptions) -> None:
    """Give a gate the parameters that its spec names, each as the attribute of its name."""
    for weight in options.spec.gate_weights:
        values = Normal(options.init_std) if weight.initial is None else Constant(weight.initial)
        shape = weight.shape(options.hidden, options.groups.total)
        setattr(gate, weight.name, Parameter(initializer(values, shape), name=weight.name))


class Gate(nn.Cell):
    """Learned gate: x_TD, routing -> (plan, combine weights [T, K], auxiliary loss, rows [B, E + 1]).

    `routing`: the noise, if there is any, and text_T1 (1 where a position holds text) where rows are padded: padding
    chooses no expert, counts in no loss and takes no room. Both are there while training only.

    With `return_assignments`, set before compiling, the last is the hits [T, E], 1 where a token takes an expert. With
    `routes_only` loss and rows are None: tokens of generation make no whole samples.
    Capacity goes to first choices before second ones, then in token order (arXiv 2006.16668, algorithm 1); a choice
    beyond it takes the residual alone. Gates compute in float32. In an SPMD graph over a mesh each rank gates
    its own tokens, with a copy of the weight, and plans reserved rows (`rre.dispatch.capacity_dispatch`).
    """

    def __init__(self, router: LearnedRouter) -> None:
        super().__init__()
        options = router.options
        layout = options.layout
        self.experts, self.choices, self.length = options.groups.total, router.choices, options.length
        self.capacity, self.group = router.capacity, router.group
        self.padded = options.padded
        add_gate_weights(self, options)
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
        if self.padded:
            self.whole = layout(ops.Cast(), two)
            self.of_text = layout(ops.Mul(), two, two)
            self.or_no_expert = layout(ops.Add(), two, two)
            self.is_padding = layout(ops.Sub(), (), two)
            self.no_expert_times = layout(ops.Mul(), two, ())
            self.one, self.no_expert = Tensor(1, ms.int32), Tensor(self.experts, ms.int32)
        self.is_spmd = layout.spmd_mesh is not None
        if self.is_spmd:
            cut = (layout, layout.spmd_mesh, self.experts, self.group)
            self.plan_by_capacity = CapacityPlanInGraph(*cut, self.capacity)
            # A token chooses an expert at most once, so with room for all of a group's tokens nothing is dropped.
            self.plan_all = CapacityPlanInGraph(*cut, self.group)
            self.room_for_all = Tensor(float(self.group), ms.float32)
        else:
            self.plan = build_plan_cell(self.experts, layout, options.exchange)
        self.return_assignments, self.routes_only = False, False
        self.choices_of_token = Tensor(float(self.choices), ms.float32)
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
        if self.capacity is not None:
            self.room = Tensor(float(self.capacity), ms.float32)

    def choose(self, x_TD: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Choose experts: (ids int32 [T, K], E for a choice that is not made; weights [T, K]; what `auxiliary` needs).

        Without noise it chooses as evaluation does.
        """
        raise NotImplementedError

    def auxiliary(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> Tensor:
        """Compute the weighted auxiliary loss of `hits_TKE`, 1 where a choice fell on an expert, before dropping.

        `text` is (text_T1,) or ().
        """
        raise NotImplementedError

    def construct(self, x_TD: Tensor, routing: tuple[Tensor, ...]):
        # 1. Route.
        text = ()
        if self.padded and self.training:
            text, routing = routing[-1:], routing[:-1]
        chosen = self.choose(x_TD, routing)
        ids_TK = chosen[0]
        if len(text) > 0:
            ids_TK = self.without_padding(ids_TK, text[0])
        if self.routes_only:
            return self.plan(ids_TK), chosen[1], None, None
        hits_TKE = ops.stop_gradient(self.one_hot(ids_TK, self.experts, self.on, self.off))
        auxiliary = self.auxiliary(hits_TKE, chosen, text)
        routed_BE = self.rows(hits_TKE)
        kept_BE = routed_BE
        # 2. Apply the capacity and plan the dispatch. Evaluation drops nothing, whatever training does.
        if self.is_spmd and self.training:
            hits_TKE, rank_TKE = self.with_room(hits_TKE, self.room)
            kept_BE = self.rows(hits_TKE)
            plan = self.plan_by_capacity(hits_TKE, rank_TKE)
        elif self.is_spmd:
            hits_TKE, rank_TKE = self.with_room(hits_TKE, self.room_for_all)
            plan = self.plan_all(hits_TKE, rank_TKE)
        elif self.training and self.capacity is not None:
            hits_TKE, _ = self.with_room(hits_TKE, self.room)
            kept_BE = self.rows(hits_TKE)
            has_room_TK = self.greater(self.sum(hits_TKE, 2), self.off)
            plan = self.plan(self.select(has_room_TK, ids_TK, ops.fill(ms.int32, ids_TK.shape, self.experts)))
        else:
            plan = self.plan(ids_TK)
        # 3. Count rows and, per sample, the choices that were dropped, as a number of tokens.
        if self.return_assignments:
            return plan, chosen[1], auxiliary, self.assignments(hits_TKE, chosen)
        lost_B1 = self.of_choices(self.overflow_sum(self.sub(routed_BE, kept_BE), 1), self.choices_of_token)
        return plan, chosen[1], auxiliary, self.concat((kept_BE, lost_B1))

    def without_padding(self, ids_TK: Tensor, text_T1: Tensor) -> Tensor:
        """The choices with E, which is no expert, for those of padding."""
        text_T1 = self.whole(text_T1, ms.int32)
        padding_T1 = self.is_padding(self.one, text_T1)
        return self.or_no_expert(self.of_text(ids_TK, text_T1), self.no_expert_times(padding_T1, self.no_expert))

    def assignments(self, hits_TKE: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
        """Return the hits [T, E] that `return_assignments` asks for."""
        return self.sum(hits_TKE, 1)

    def rows(self, hits_TKE: Tensor) -> Tensor:
        """Count the rows of every sample and expert [B, E]."""
        return self.sum(hits_TKE.reshape(-1, self.length * self.choices, self.experts), 1)

    def with_room(self, hits_TKE: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Apply expert capacity `room`: `hits_TKE` without the choices beyond it, and each choice's rank [T, K, E].

        The rank is among its group's choices of the expert, counted from 1.
        """
        ordered = hits_TKE.reshape(-1, self.group, self.choices, self.experts)
        if self.choices > 1:
            ordered = self.turn(ordered, (0, 2, 1, 3))
        ordered = ordered.reshape(-1, self.group * self.choices, self.experts)
        rank = self.cumulative(ordered, 1)
        if self.choices > 1:
            rank = self.turn(rank.reshape(-1, self.choices, self.group, self.experts), (0, 2, 1, 3))
        rank = rank.reshape(hits_TKE.shape)
        has_room_TKE = self.less_equal(rank, room)
        return self.mul(hits_TKE, self.cast(has_room_TKE, ms.float32)), rank
