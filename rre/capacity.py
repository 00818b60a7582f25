"""Dispatch by capacity with static shapes: what a graph that is cut over devices needs.

Every row shard (the samples of one rank that reads) reserves the same number of rows for every expert slot of its
exchange group. Where rows stand is planned outside the graph; inside, dispatch and combine are gathers by position that
stay inside a shard, and the exchange is a change of layout between two operators that touch nothing: the axis of source
ranks is whole where the axis of slots is cut, and the other way round. From that MindSpore inserts AllToAll; on one
device it is the identity.

Legend: T tokens, k experts per token, D hidden width, F inner width, N slots; P row shards of n tokens = G placement
groups x X expert parts x R data replicas; M = N / G slots of a group, C rows reserved for a slot by a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.primitives import activation
from rre.dispatch import DROPPED


@dataclass(frozen=True)
class CapacityPlan:
    """Where rows stand.

    `dispatch` int32 [P, M*C]: the token in its shard that fills each reserved row, 0 where none does; `combine` int32
    [P, n*k]: the reserved row of each choice; `kept` float32 [P, n*k]: 0 for a dropped choice, else 1.
    """

    dispatch: np.ndarray
    combine: np.ndarray
    kept: np.ndarray


def plan_by_capacity(slot_ids: np.ndarray, mesh: Mesh, slots: int, capacity: int) -> CapacityPlan:
    """Plan `slot_ids` [T, k] (DROPPED where a choice overflowed its expert) over the mesh's row shards.

    Raises ValueError if a shard wants a slot of another placement group, or more than `capacity` rows of a slot.
    """
    tokens, k = slot_ids.shape
    shards, of_group = mesh.rows, slots // mesh.placement_groups
    n = tokens // shards
    dispatch = np.zeros((shards, of_group * capacity), np.int32)
    combine = np.zeros((shards, n * k), np.int32)
    by_shard = slot_ids.reshape(shards, n * k)
    for shard, ids in enumerate(by_shard):
        first = shard // (shards // mesh.placement_groups) * of_group
        valid = np.flatnonzero(ids != DROPPED)
        local = ids[valid] - first
        if local.size and (local.min() < 0 or local.max() >= of_group):
            raise ValueError(f"row shard {shard} has tokens for experts outside its placement group")
        order = np.argsort(local, kind="stable")
        ranked = local[order]
        rank = np.arange(ranked.size) - np.searchsorted(ranked, ranked, side="left")
        if rank.size and rank.max() >= capacity:
            raise ValueError(f"row shard {shard} has {rank.max() + 1} rows for a slot that takes {capacity}")
        row = ranked * capacity + rank
        choice = valid[order]
        dispatch[shard, row] = choice // k
        combine[shard, choice] = row
    return CapacityPlan(dispatch, combine, (by_shard != DROPPED).astype(np.float32))


class CapacityNetworks(nn.Cell):
    """x_TD, plan (dispatch, combine, kept), weights (up [N, D, F], its bias [N, F], down [N, F, D], its bias [N, D])
    -> y [T*k, D] by choice, 0 for a dropped one. Rows travel in the compute type."""

    def __init__(self, layout: Layout, activation_name: str, compute: ms.dtype, mesh: Mesh) -> None:
        super().__init__()
        self.compute = compute
        self.shards, self.data = mesh.rows, mesh.data
        self.groups, self.parts = mesh.placement_groups, mesh.exchange_size
        shard = ("rows", 1, 1)
        # [G, X, R, M, C, D] with its source axes cut, and [G, M, R, X, C, D] with its slots cut.
        by_source = by_slot = ("group", "exchange", "data", 1, 1, 1)
        self.low = layout(ops.Cast(), ("rows", 1, 1))
        self.take = layout(ops.Gather(1), shard, ("rows", 1))
        self.slots_first = layout(ops.Transpose(), by_source)
        self.to_experts = layout(ops.Mul(), by_slot, ())
        self.up = layout(ops.BatchMatMul(), ("expert", "data", 1), ("expert", 1, "tensor"))
        self.add_inner = layout(ops.Add(), ("expert", "data", "tensor"), ("expert", 1, "tensor"))
        self.activation = activation(activation_name, layout, ("expert", "data", "tensor"))
        self.down = layout(ops.BatchMatMul(), ("expert", "data", "tensor"), ("expert", "tensor", 1))
        self.add_outer = layout(ops.Add(), ("expert", "data", 1), ("expert", 1, 1))
        self.low_up = layout(ops.Cast(), ("expert", 1, "tensor"))
        self.low_down = layout(ops.Cast(), ("expert", "tensor", 1))
        self.low_bias = layout(ops.Cast(), ("expert", 1, 1))
        self.low_inner_bias = layout(ops.Cast(), ("expert", 1, "tensor"))
        # Not a reshape: that has no cut of its own, and a bias behind one would come in cut otherwise.
        self.outer_column = layout(ops.ExpandDims(), ("expert", 1))
        self.inner_column = layout(ops.ExpandDims(), ("expert", "tensor"))
        self.sources_first = layout(ops.Transpose(), by_slot)
        self.to_tokens = layout(ops.Mul(), by_source, ())
        self.full = layout(ops.Cast(), shard)
        self.keep = layout(ops.Mul(), shard, shard)
        self.reshape = ops.Reshape()
        self.one = Tensor(1.0, compute)

    def construct(self, x: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        dispatch, combine, kept = plan
        up, up_bias, down, down_bias = weights
        slots, hidden = up.shape[0], up.shape[1]
        of_group = slots // self.groups
        capacity = dispatch.shape[1] // of_group
        # 1. Every shard lays its rows out by slot.
        rows = self.low(self.reshape(x, (self.shards, -1, hidden)), self.compute)
        y = self.take(rows, dispatch, 1)
        y = self.reshape(y, (self.groups, self.parts, self.data, of_group, capacity, hidden))
        # 2. Rows to experts: the source axis X is cut before, the slot axis M after.
        y = self.to_experts(self.slots_first(y, (0, 3, 2, 1, 4, 5)), self.one)
        y = self.reshape(y, (slots, self.data * self.parts * capacity, hidden))
        # 3. Every expert on the rows of all sources.
        y = self.up(y, self.low_up(up, self.compute))
        y = self.add_inner(y, self.low_inner_bias(self.inner_column(up_bias, 1), self.compute))
        y = self.down(self.activation(y)[0], self.low_down(down, self.compute))
        y = self.add_outer(y, self.low_bias(self.outer_column(down_bias, 1), self.compute))
        # 4. Results to tokens: the reverse of 2 and 1.
        y = self.reshape(y, (self.groups, of_group, self.data, self.parts, capacity, hidden))
        y = self.to_tokens(self.sources_first(y, (0, 3, 2, 1, 4, 5)), self.one)
        y = self.reshape(y, (self.shards, of_group * capacity, hidden))
        y = self.full(self.take(y, combine, 1), ms.float32)
        y = self.keep(y, self.reshape(kept, (self.shards, -1, 1)))
        return self.reshape(y, (-1, hidden))
