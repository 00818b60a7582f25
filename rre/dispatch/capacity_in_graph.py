"""Capacity plan inside the graph: token permutation with a fixed expert capacity, for learned gates on a mesh.

It is the in-graph counterpart of `rre.dispatch.capacity_dispatch.plan_by_capacity`. An expert has capacity C for each
dispatch group, so the row of a choice follows from the group, the expert and the choice's rank among the group's
choices of that expert: nothing is sorted, and no shape depends on the routing.

Legend: T tokens of G dispatch groups of S, P row shards of G / P groups, E experts, K choices per token (top-k),
J = S K choices of a group, C capacity of an expert for one group, R = E C rows of a group.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.mesh import Mesh
from parallel.operator_layout import Layout


class CapacityPlanInGraph(nn.Cell):
    """Capacity plan of a learned gate: hits and ranks (from 1) of choices that found room [T, K, E] -> a plan.

    The plan is (dispatch [P, G/P R], combine [P, G/P J], kept [P, G/P J]), as `capacity_dispatch.CapacityPlan` has
    them, without a gradient. Which token fills a row is a sum over a mask [G, J, R]: factor * (S K)^2 values for each
    group of a rank. Row numbers are whole numbers in float32, exact up to 2^24 rows of a shard.
    """

    def __init__(self, layout: Layout, mesh: Mesh, experts: int, group: int, rows_of_group: int) -> None:
        super().__init__()
        self.shards, self.experts, self.group, self.rows = mesh.rows, experts, group, rows_of_group
        two, three, four = (("rows", *(1,) * n) for n in (1, 2, 3))
        self.add_expert = layout(ops.Add(), three, (1,))
        self.only_hits = layout(ops.Mul(), three, three)
        self.of_choice = layout(ops.ReduceSum(), three)
        self.add_group = layout(ops.Add(), two, two)
        self.only_kept = layout(ops.Mul(), two, two)
        self.missing = layout(ops.Sub(), (), two)
        self.beyond = layout(ops.Mul(), two, ())
        self.add = layout(ops.Add(), two, two)
        self.cast = layout(ops.Cast(), two)
        self.mask = layout(ops.OneHot(), three, (), ())
        self.token = layout(ops.Mul(), three, (1, 1))
        self.token_sum = layout(ops.ReduceSum(), three)
        self.by_expert = layout(ops.Transpose(), four)
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, hits_TKE: Tensor, rank_TKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hits_TKE, rank_TKE = ops.stop_gradient(hits_TKE), ops.stop_gradient(rank_TKE)
        tokens, num_choices = hits_TKE.shape[0], hits_TKE.shape[1]
        groups, choices_per_group = tokens // self.group, self.group * num_choices
        groups_per_shard, rows_per_group = groups // self.shards, self.experts * self.rows
        group_in_shard_G1 = np.arange(groups, dtype=np.float32).reshape(-1, 1) % groups_per_shard
        kept_GJ = self.of_choice(hits_TKE, 2).reshape(groups, choices_per_group)

        # 1. Combine: where a choice's row stands in its shard, which lays rows out expert by expert, for each expert
        # group by group. Offsets are less by 1 because ranks count from 1.
        offset_E = Tensor(np.arange(self.experts, dtype=np.float32) * (groups_per_shard * self.rows) - 1.0)
        row_TKE = self.only_hits(hits_TKE, self.add_expert(rank_TKE, offset_E))
        row_GJ = self.of_choice(row_TKE, 2).reshape(groups, choices_per_group)
        combine_GJ = self.only_kept(self.add_group(row_GJ, Tensor(group_in_shard_G1 * self.rows)), kept_GJ)

        # 2. Dispatch: which token fills each of the group's own rows. A dropped choice points behind the last row,
        # where the one-hot mask has no column.
        offset_E = Tensor(np.arange(self.experts, dtype=np.float32) * self.rows - 1.0)
        row_TKE = self.only_hits(hits_TKE, self.add_expert(rank_TKE, offset_E))
        row_GJ = self.of_choice(row_TKE, 2).reshape(groups, choices_per_group)
        behind_last = Tensor(float(rows_per_group), ms.float32)
        row_GJ = self.add(row_GJ, self.beyond(self.missing(self.on, kept_GJ), behind_last))
        mask_GJR = self.mask(self.cast(row_GJ, ms.int32), rows_per_group, self.on, self.off)
        token_J1 = Tensor((np.arange(choices_per_group, dtype=np.float32) // num_choices).reshape(-1, 1))
        dispatch_GR = self.token_sum(self.token(mask_GJR, token_J1), 1)
        dispatch_GR = self.add_group(dispatch_GR, Tensor(group_in_shard_G1 * self.group))

        # 3. Transpose: from a shard's rows by group to its rows by expert.
        by_group = (self.shards, groups_per_shard, self.experts, self.rows)
        dispatch_PEGC = self.by_expert(dispatch_GR.reshape(by_group), (0, 2, 1, 3))
        choices_of_shard = (self.shards, groups_per_shard * choices_per_group)
        return (
            self.cast(dispatch_PEGC.reshape(self.shards, -1), ms.int32),
            self.cast(combine_GJ.reshape(choices_of_shard), ms.int32),
            kept_GJ.reshape(choices_of_shard),
        )
