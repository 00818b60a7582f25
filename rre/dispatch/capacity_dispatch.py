"""Capacity dispatch: token permutation with a fixed expert capacity, whose static shapes an SPMD graph needs.

Every row shard (the samples of one rank that reads) reserves the same number of rows for every expert slot of its
exchange group. Where rows stand is planned outside the graph; inside, dispatch and combine are gathers by position that
stay inside a shard, and `parallel.layout_exchange` moves rows between them.

The slots may be cut into *chunks*, whose exchanges do not wait for one another's experts, so that a device that sends
and computes at once can overlap them.

Legend: T tokens, K choices per token (top-k), D hidden width, F feed-forward width, N slots; P row shards of S tokens
= placement groups x X expert parts x data replicas; M slots of a placement group, C capacity: rows that a slot takes of
a shard, Q chunks of the slots, J = S K choices of a shard, R rows
of a slot or a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.layout_exchange import LayoutExchange
from parallel.mesh import Mesh
from parallel.operator_layout import Layout
from parallel.ops.primitives import activation
from parallel.partition_spec import PartitionSpec
from rre.dispatch.dispatch_plan import DROPPED
from rre.feed_forward_spec import FeedForwardSpec

# How an activated expert's weights [N, …] enter a graph: no two ranks give the same values, so no gradient that leaves
# needs a sum over ranks afterwards. What an operator wants whole is gathered inside the graph, and its gradient there
# summed and scattered.
WEIGHT_SPECS: dict[str, PartitionSpec] = {
    "gate.weight": ("expert", "data", "tensor"),
    "up.weight": ("expert", "data", "tensor"),
    "up.bias": ("expert", ("tensor", "data")),
    "down.weight": ("expert", "tensor", "data"),
    "down.bias": ("expert", ("data", "tensor")),
}

# The same of weights that are parameters of a graph, as a pipeline's are: MindSpore cuts them as their product wants
# them, and sums the gradients of what several ranks hold.
PARAMETER_SPECS: dict[str, PartitionSpec] = {
    "gate.weight": ("expert", 1, "tensor"),
    "up.weight": ("expert", 1, "tensor"),
    "up.bias": ("expert", "tensor"),
    "down.weight": ("expert", "tensor", 1),
    "down.bias": ("expert", 1),
}


@dataclass(frozen=True)
class CapacitySpec:
    """Expert capacity and static shapes of a sparse layer on a mesh.

    `slots` N of all placement groups, `rows` C of each from one shard, `tokens` T of all shards, `choices` K, and the
    `chunks` Q that the slots are cut into.
    """

    mesh: Mesh
    slots: int
    rows: int
    tokens: int
    choices: int = 1
    chunks: int = 1

    @property
    def slots_per_group(self) -> int:
        """M, the slots of one placement group."""
        return self.slots // self.mesh.placement_groups

    @property
    def slots_per_part(self) -> int:
        """Slots of one expert part."""
        return self.slots // self.mesh.expert

    def plan_inputs(self) -> list[tuple[tuple[int, ...], ms.dtype, PartitionSpec]]:
        """Shape, type and partition of the graph's inputs: Q dispatch, combine, kept (see `CapacityPlan`)."""
        shards, cut = self.mesh.rows, ("rows", 1)
        choices = (shards, self.tokens * self.choices // shards)
        dispatch = (shards, self.slots_per_group // self.chunks * self.rows)
        return [*[(dispatch, ms.int32, cut)] * self.chunks, (choices, ms.int32, cut), (choices, ms.float32, cut)]

    def weight_inputs(
        self, spec: FeedForwardSpec, hidden: int, ffn: int
    ) -> list[tuple[tuple[int, ...], ms.dtype, PartitionSpec]]:
        """Shape, type and partition of the weights: Q times each tensor of an expert of this spec, [N/Q, …]."""
        shapes = spec.shapes(hidden, ffn).items()
        one = [((self.slots // self.chunks, *shape), ms.float32, WEIGHT_SPECS[name]) for name, shape in shapes]
        return one * self.chunks

    def slots_of(self, experts: np.ndarray, total: int) -> np.ndarray:
        """The slot of each of the present `experts` (ascending positions on a layer's axis of `total`), int [present].

        A group's experts lie round its expert parts in turn, so that a domain's experts keep all of them busy: part p
        owns positions p, p + X, p + 2 X, … of the group. With every expert present each has one slot always. Raises
        ValueError if a part is given more than it has slots.
        """
        of_group, parts = total // self.mesh.placement_groups, self.mesh.exchange_size
        group, inside = np.divmod(experts, of_group)
        part = group * parts + inside % parts
        slots = np.empty(experts.size, np.int64)
        for p in np.unique(part):
            members = np.flatnonzero(part == p)
            if members.size > self.slots_per_part:
                raise ValueError(
                    f"expert part {p} has {members.size} experts with rows and {self.slots_per_part} slots"
                )
            slots[members] = p * self.slots_per_part + np.arange(members.size)
        return slots

    def idle_experts(self, total: int) -> np.ndarray:
        """For each slot an expert that its part owns, int [N]: it stands there when no rows ask for another."""
        groups, parts = self.mesh.placement_groups, self.mesh.exchange_size
        first = np.arange(groups)[:, None] * (total // groups) + np.arange(parts)
        return np.repeat(first.reshape(-1), self.slots_per_part)

    def by_chunk(self, part: int | None = None) -> np.ndarray:
        """Slot numbers [Q, N/Q]: each chunk takes an equal run of every expert part's slots; or those [Q, N/(E Q)] of
        one of the E expert parts."""
        numbers = np.arange(self.slots).reshape(self.mesh.expert, self.chunks, -1).transpose(1, 0, 2)
        return numbers.reshape(self.chunks, -1) if part is None else numbers[:, part]


class CapacityExceeded(ValueError):
    """A slot gets more rows than its capacity."""


@dataclass(frozen=True)
class CapacityPlan:
    """Token permutation by capacity, on the host: which token fills each row, and where each choice's row stands.

    `dispatch`: for each chunk int32 [P, M/Q C], the token in its shard that fills each reserved row, 0 where none does;
    `combine` int32 [P, J]: the reserved row of each choice, counted over all chunks; `kept` float32 [P, J]: 0 for a
    dropped choice, else 1.
    """

    dispatch: tuple[np.ndarray, ...]
    combine: np.ndarray
    kept: np.ndarray

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """In the order in which the graph takes them."""
        return (*self.dispatch, self.combine, self.kept)


def plan_by_capacity(slot_ids_TK: np.ndarray, capacity_spec: CapacitySpec, shards: range | None = None) -> CapacityPlan:
    """Plan `slot_ids_TK` (DROPPED where a choice overflowed its expert) of `shards`, by default all row shards.

    Raises ValueError if a shard wants a slot of another placement group, and
    CapacityExceeded for more than C rows of a slot.
    """
    tokens, num_choices = slot_ids_TK.shape
    mesh, capacity, of_group = capacity_spec.mesh, capacity_spec.rows, capacity_spec.slots_per_group
    shards = range(mesh.rows) if shards is None else shards
    n = tokens // len(shards)
    dispatch_PR = np.zeros((len(shards), of_group * capacity), np.int32)
    combine_PJ = np.zeros((len(shards), n * num_choices), np.int32)
    by_shard_PJ = slot_ids_TK.reshape(len(shards), n * num_choices)
    # Where a slot of the group stands when chunks lie one behind the other.
    by_chunk = np.arange(of_group).reshape(mesh.exchange_size, capacity_spec.chunks, -1).swapaxes(0, 1)
    position = np.argsort(by_chunk.reshape(-1))
    for line, (shard, ids) in enumerate(zip(shards, by_shard_PJ, strict=True)):
        first = shard // (mesh.rows // mesh.placement_groups) * of_group
        valid = np.flatnonzero(ids != DROPPED)
        local = ids[valid] - first
        if local.size and (local.min() < 0 or local.max() >= of_group):
            raise ValueError(f"row shard {shard} has tokens for experts outside its placement group")
        order = np.argsort(local, kind="stable")
        ranked = local[order]
        rank = np.arange(ranked.size) - np.searchsorted(ranked, ranked, side="left")
        if rank.size and rank.max() >= capacity:
            raise CapacityExceeded(f"row shard {shard} has {rank.max() + 1} rows for a slot that takes {capacity}")
        row = position[ranked] * capacity + rank
        choice = valid[order]
        dispatch_PR[line, row] = choice // num_choices
        combine_PJ[line, choice] = row
    chunks = tuple(np.ascontiguousarray(part) for part in np.split(dispatch_PR, capacity_spec.chunks, axis=1))
    return CapacityPlan(chunks, combine_PJ, (by_shard_PJ != DROPPED).astype(np.float32))


class BatchedExperts(nn.Cell):
    """Experts as batched GEMM: rows_NRD and the tensors of N experts, each [N, …] -> y_NRD."""

    def __init__(self, layout: Layout, spec: FeedForwardSpec, compute: ms.dtype) -> None:
        super().__init__()
        self.spec, self.compute = spec, compute
        outer, inner = ("expert", "data", 1), ("expert", "data", "tensor")
        self.up = layout(ops.BatchMatMul(), outer, ("expert", 1, "tensor"))
        self.add_inner = layout(ops.Add(), inner, ("expert", 1, "tensor"))
        self.activation = activation(spec.activation, layout, inner)
        self.mul = layout(ops.Mul(), inner, inner)
        self.down = layout(ops.BatchMatMul(), inner, ("expert", "tensor", 1))
        self.add_outer = layout(ops.Add(), outer, ("expert", 1, 1))
        # Cast as they come in: what is gathered afterwards is half as long.
        self.low = [layout(ops.Cast(), WEIGHT_SPECS[name]) for name in spec.tensors]
        # Not a reshape: that has no cut of its own, and a bias behind one would come in cut otherwise.
        self.inner_column = layout(ops.ExpandDims(), ("expert", "tensor"))
        self.outer_column = layout(ops.ExpandDims(), ("expert", 1))

    def construct(self, rows_NRD: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        low = ()
        for i in range(len(weights)):
            low = low + (self.low[i](weights[i], self.compute),)
        if self.spec.gated:
            gated_NRF = self.mul(self.activation(self.up(rows_NRD, low[0]))[0], self.up(rows_NRD, low[1]))
            return self.down(gated_NRF, low[2])
        if self.spec.biases:
            inner_NRF = self.add_inner(self.up(rows_NRD, low[0]), self.inner_column(low[1], 1))
            y_NRD = self.down(self.activation(inner_NRF)[0], low[2])
            return self.add_outer(y_NRD, self.outer_column(low[3], 1))
        return self.down(self.activation(self.up(rows_NRD, low[0]))[0], low[1])


class CapacityExperts(nn.Cell):
    """Dispatch, exchange, experts and combine by capacity on a device mesh.

    x_TD, plan (Q dispatch, combine, kept), Q times the tensors of N/Q experts, each [N/Q, …] -> y [T K, D], a row per
    choice, 0 for a dropped one. Rows travel in the compute type.
    """

    def __init__(
        self, layout: Layout, spec: FeedForwardSpec, compute: ms.dtype, mesh: Mesh, chunks: int = 1
    ) -> None:
        super().__init__()
        self.compute, self.chunks, self.each = compute, chunks, len(spec.tensors)
        self.shards, self.groups = mesh.rows, mesh.placement_groups
        shard = ("rows", 1, 1)
        self.low = layout(ops.Cast(), layout.residual_spec)
        self.take = layout(ops.Gather(1), shard, ("rows", 1))
        self.exchange = LayoutExchange(layout, compute, mesh)
        self.experts = BatchedExperts(layout, spec, compute)
        self.behind = layout(ops.Concat(1), *[shard] * chunks)
        self.full = layout(ops.Cast(), shard)
        self.keep = layout(ops.Mul(), shard, shard)
        self.reshape = ops.Reshape()

    def construct(self, x_TD: Tensor, plan: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        dispatch, combine_PJ, kept_PJ = plan[: self.chunks], plan[self.chunks], plan[self.chunks + 1]
        hidden = x_TD.shape[1]
        rows_PSD = self.reshape(self.low(x_TD, self.compute), (self.shards, -1, hidden))
        results = ()
        for c in range(self.chunks):
            chunk_weights = weights[self.each * c : self.each * (c + 1)]
            slots_per_group = chunk_weights[0].shape[0] // self.groups
            # 1. Dispatch: every shard lays its rows out by slot.
            sent = self.take(rows_PSD, dispatch[c], 1)
            # 2. Exchange to experts (AllToAll), 3. every expert on the rows of all sources, 4. exchange back.
            rows_NRD = self.exchange.to_experts(sent, slots_per_group)
            y_NRD = self.experts(rows_NRD, chunk_weights)
            results = results + (self.exchange.to_tokens(y_NRD, slots_per_group),)
        # 5. Combine: every choice takes its row; a dropped one takes 0.
        y_PRD = results[0] if self.chunks == 1 else self.behind(results)
        y_PJD = self.full(self.take(y_PRD, combine_PJ, 1), ms.float32)
        y_PJD = self.keep(y_PJD, self.reshape(kept_PJ, (self.shards, -1, 1)))
        return self.reshape(y_PJD, (-1, hidden))
