"""Exchange of an SPMD graph: a change of layout, from which MindSpore inserts AllToAll.

Two operators that touch nothing stand side by side: the axis of source ranks is sharded before and replicated after,
the axis of expert slots the other way round. On one device both are the identity.

Legend: P row shards = G placement groups x X expert parts x R data replicas; M slots of a group, N = G M of all, C rows
that a shard reserves for a slot, D width.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.mesh import Mesh
from parallel.operator_layout import Layout


class LayoutExchange(nn.Cell):
    """Rows by slot [P, M*C, D] of every shard <-> rows of every slot [N, R*X*C, D]."""

    def __init__(self, layout: Layout, compute: ms.dtype, mesh: Mesh) -> None:
        super().__init__()
        self.shards, self.data = mesh.rows, mesh.data
        self.groups, self.parts = mesh.placement_groups, mesh.exchange_size
        # [G, X, R, M, C, D] with its source axes sharded, and [G, M, R, X, C, D] with its slots sharded.
        by_source = by_slot = ("group", "exchange", "data", 1, 1, 1)
        self.slots_first = layout(ops.Transpose(), by_source)
        self.rows_arrive = layout(ops.Mul(), by_slot, ())
        self.sources_first = layout(ops.Transpose(), by_slot)
        self.rows_return = layout(ops.Mul(), by_source, ())
        self.reshape = ops.Reshape()
        self.one = Tensor(1.0, compute)

    def to_experts(self, rows: Tensor, of_group: int) -> Tensor:
        """Hand each slot's rows to the rank that owns its expert; `of_group` is M."""
        capacity, hidden = rows.shape[1] // of_group, rows.shape[2]
        y = self.reshape(rows, (self.groups, self.parts, self.data, of_group, capacity, hidden))
        y = self.rows_arrive(self.slots_first(y, (0, 3, 2, 1, 4, 5)), self.one)
        return self.reshape(y, (self.groups * of_group, self.data * self.parts * capacity, hidden))

    def to_tokens(self, rows: Tensor, of_group: int) -> Tensor:
        """Hand each slot's results back to the ranks that own the tokens."""
        capacity, hidden = rows.shape[1] // (self.data * self.parts), rows.shape[2]
        y = self.reshape(rows, (self.groups, of_group, self.data, self.parts, capacity, hidden))
        y = self.rows_return(self.sources_first(y, (0, 3, 2, 1, 4, 5)), self.one)
        return self.reshape(y, (self.shards, of_group * capacity, hidden))

    def construct(self, rows: Tensor, of_group: int) -> Tensor:
        return self.to_experts(rows, of_group)
