"""Exchange of expert parallelism: the two collectives that bring rows to their experts and results back.

Three realisations. A process that owns every expert: the identity (`LocalExchange`). Several CPU processes: explicit
collectives with their own gradients (`GatheredExchange`). An SPMD graph: changes of layout between
operators that touch nothing, from which MindSpore inserts AllToAll (`parallel.layout_exchange`).

CPU processes have neither AllToAll nor collectives of a part of the processes. So rows are gathered from all, every
process computes its own experts on those that want them, and the results, 0 wherever another process computes, are
summed: shapes are fixed however uneven the routing is, nothing is padded and nothing dropped. (Megatron-Core calls
this the allgather dispatcher.) Adding zeros is exact, so a token's result has the bits that its expert computed.

Legend: W processes = E expert parts x R data replicas; X parts whose rows meet; n rows of a process, D their width.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.mesh import Mesh


class LocalExchange(nn.Cell):
    """The exchange of a process that owns every expert: the identity in both directions."""

    def to_experts(self, rows: Tensor) -> Tensor:
        """Rows [n, D] of this process's tokens -> the rows [X n, D] among which those for its experts are."""
        return rows

    def to_tokens(self, results: Tensor) -> Tensor:
        """Results [X n, D], 0 where another process computes -> those of this process's own rows [n, D]."""
        return results

    def choices(self, expert_ids: Tensor) -> Tensor:
        """Expert ids int32 [n, k] of this process's tokens -> those [X n, k] of the rows that come here, by number of
        the experts held here; that number of experts for one that is elsewhere, or dropped."""
        return expert_ids

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of float32 values."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes of float32 values."""
        return values

    def construct(self, rows: Tensor) -> Tensor:
        return self.to_experts(rows)


class RowTransfer(nn.Cell):
    """One direction of the exchange, x [n, …] -> [X n, …] of the ranks whose rows meet, in their order, or back as
    their sum; `backward`, the other direction, carries the gradient."""

    def __init__(self, forward: nn.Cell, backward: nn.Cell) -> None:
        super().__init__()
        self.forward, self.backward = forward, backward

    def construct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.backward(dout),)


class GroupAllGather(nn.Cell):
    """x [n, …] -> [X n, …]: an AllGather over all processes, of which the group's parts are kept."""

    def __init__(self, mesh: Mesh, rank: int, first: int, parts: int) -> None:
        super().__init__()
        self.grid = (mesh.expert, mesh.data)
        self.rank, self.replica = rank, mesh.coordinates(rank).data
        self.first, self.parts = first, parts
        self.is_all = self.grid == (parts, 1)
        self.all_gather = ops.AllGather()

    def construct(self, x: Tensor) -> Tensor:
        every = self.all_gather(x)
        if self.is_all:
            return every
        shape = x.shape
        by_rank = every.reshape(self.grid + shape)
        group = by_rank[self.first : self.first + self.parts, self.replica]
        return group.reshape((self.parts * shape[0],) + shape[1:])


class GroupReduce(nn.Cell):
    """x float32 [X n, D] -> [n, D]: an AllReduce over all processes, into which each adds for its own group alone."""

    def __init__(self, members: GroupAllGather) -> None:
        super().__init__()
        self.size, self.rank = members.grid[0] * members.grid[1], members.rank
        self.parts, self.is_all = members.parts, members.is_all
        self.all_reduce = ops.AllReduce()
        above, after = members.grid[0] - members.first - members.parts, members.grid[1] - members.replica - 1
        self.pad = ops.Pad(((members.first, above), (members.replica, after), (0, 0), (0, 0)))

    def construct(self, x: Tensor) -> Tensor:
        rows, width = x.shape[0] // self.parts, x.shape[1]
        if not self.is_all:
            x = self.pad(x.reshape(self.parts, 1, rows, width))
        total = self.all_reduce(x.reshape(self.size, rows * width))
        return total[self.rank].reshape(rows, width)


class ProcessMean(nn.Cell):
    """float32 values of each process -> their mean over all processes.

    For what every process computes from it alike and the job counts once, as an auxiliary loss: of that, a process's
    own values have this share of the gradient, and nobody else needs it.
    """

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes
        self.all_reduce = ops.AllReduce()

    def construct(self, values: Tensor) -> Tensor:
        return self.all_reduce(values) / self.processes

    def bprop(self, values: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout / self.processes,)


class GatheredExchange(LocalExchange):
    """The exchange of several CPU processes, seen from `rank`, for sparse layers of so many `experts`.

    In training rows meet inside a placement group. Outside it they meet along the whole expert axis, because any text
    may be measured under any domain's experts.
    """

    def __init__(self, mesh: Mesh, rank: int, experts: int) -> None:
        super().__init__()
        local_experts = mesh.experts_of(rank, experts)
        self.first_expert, self.num_local_experts = local_experts.start, len(local_experts)
        start = mesh.placement_group(rank) * mesh.exchange_size
        group = GroupAllGather(mesh, rank, start, mesh.exchange_size)
        expert_axis = GroupAllGather(mesh, rank, 0, mesh.expert)
        self.send, self.back = RowTransfer(group, GroupReduce(group)), RowTransfer(GroupReduce(group), group)
        wide_sum = GroupReduce(expert_axis)
        self.send_wide, self.back_wide = RowTransfer(expert_axis, wide_sum), RowTransfer(wide_sum, expert_axis)
        self.send_ids, self.send_ids_wide = group, expert_axis
        self.over_all, self.processes = ProcessMean(mesh.size), mesh.size
        self.select = ops.Select()

    def to_experts(self, rows: Tensor) -> Tensor:
        return self.send(rows) if self.training else self.send_wide(rows)

    def to_tokens(self, results: Tensor) -> Tensor:
        return self.back(results) if self.training else self.back_wide(results)

    def choices(self, expert_ids: Tensor) -> Tensor:
        every = self.send_ids(expert_ids) if self.training else self.send_ids_wide(expert_ids)
        local = every - self.first_expert
        inside = ops.logical_and(local >= 0, local < self.num_local_experts)
        return self.select(inside, local, ops.fill(ms.int32, local.shape, self.num_local_experts))

    def mean(self, values: Tensor) -> Tensor:
        return self.over_all(values)

    def total(self, values: Tensor) -> Tensor:
        return self.over_all(values) * self.processes
