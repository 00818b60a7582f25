"""The plan of reserved rows made inside the graph, where a learned gate chooses (see `rre.dispatch.capacity_dispatch`).

An expert takes C0 rows of each dispatch group, so the row of a choice follows from the group, the expert and the number
of the choice among the group's choices of that expert: nothing is sorted, and no shape depends on the routing.

Legend: T tokens of B groups of S, P row shards of b = B / P groups, E experts, k choices of a token, C0 rows that an
expert takes of a group, C = b C0 of a shard.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.mesh import Mesh
from parallel.operator_layout import Layout


class CapacityPlanInGraph(nn.Cell):
    """Choices with room [T, k, E] (1 or 0) and their numbers from 1 [T, k, E] -> a plan, without a gradient.

    The plan is (dispatch [P, E C], combine [P, b S k], kept [P, b S k]), as `capacity_dispatch.CapacityPlan` has them.
    Which token fills a row is a sum over a mask [B, S k, E C0]: factor * (S k)^2 values for each group of a rank. Row
    numbers are whole numbers in float32, exact up to 2^24 rows of a shard.
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

    def construct(self, hits: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hits, number = ops.stop_gradient(hits), ops.stop_gradient(number)
        tokens, k = hits.shape[0], hits.shape[1]
        groups, of_group = tokens // self.group, self.group * k
        of_shard, taken = groups // self.shards, self.experts * self.rows
        position = np.arange(groups, dtype=np.float32).reshape(-1, 1) % of_shard

        kept = self.of_choice(hits, 2).reshape(groups, of_group)
        # 1. Where a choice stands in its shard: its expert's rows, among them its group's, among them its own.
        experts = Tensor(np.arange(self.experts, dtype=np.float32) * (of_shard * self.rows) - 1.0)
        row = self.of_choice(self.only_hits(hits, self.add_expert(number, experts)), 2).reshape(groups, of_group)
        combine = self.only_kept(self.add_group(row, Tensor(position * self.rows)), kept)
        # 2. Which token stands in each of the group's rows; one that has no room is nowhere.
        inside = Tensor(np.arange(self.experts, dtype=np.float32) * self.rows - 1.0)
        row = self.of_choice(self.only_hits(hits, self.add_expert(number, inside)), 2).reshape(groups, of_group)
        row = self.add(row, self.beyond(self.missing(self.on, kept), Tensor(float(taken), ms.float32)))
        mask = self.mask(self.cast(row, ms.int32), taken, self.on, self.off)
        numbers = Tensor((np.arange(of_group, dtype=np.float32) // k).reshape(-1, 1))
        dispatch = self.add_group(self.token_sum(self.token(mask, numbers), 1), Tensor(position * self.group))
        # 3. From rows by group to rows by expert.
        dispatch = self.by_expert(dispatch.reshape(self.shards, of_shard, self.experts, self.rows), (0, 2, 1, 3))
        shape = (self.shards, of_shard * of_group)
        return (
            self.cast(dispatch.reshape(self.shards, -1), ms.int32),
            self.cast(combine.reshape(shape), ms.int32),
            kept.reshape(shape),
        )
