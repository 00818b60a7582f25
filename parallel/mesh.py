"""The device mesh: data x expert x tensor x pipeline ranks, and which experts and domains each rank has.

Every rank of the data and expert axes reads samples of its own: together they are the *row ranks*, over which a batch
is sharded. Shared parameters are data parallel over all row ranks, experts are sharded over the expert axis and
replicated along the data axis. (Where papers say "64-way data parallel, 64-way expert parallel" of 64 row ranks, data
is 1 and expert 64 here.)

Ranks are numbered with the pipeline axis outermost, then expert, data, tensor:

    rank = ((stage * expert + e) * data + d) * tensor + t

so a placement group, which is a run of neighbours on the expert axis, is a run of neighbouring ranks. Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

PLACEMENTS = ("global", "domain")


def mesh_problems(
    data: int, expert: int, tensor: int, pipeline: int, placement: str, placement_groups: int
) -> Iterator[str]:
    """What is wrong with a mesh's numbers among themselves, sentences that begin with the field."""
    sizes = {"data": data, "expert": expert, "tensor": tensor, "pipeline": pipeline}
    for name, ranks in {**sizes, "placement_groups": placement_groups}.items():
        if ranks < 1:
            yield f"{name} = {ranks} is no number of ranks: set it to at least 1"
            return
    if placement not in PLACEMENTS:
        yield f"placement = {placement} is unknown: set it to {' or '.join(PLACEMENTS)}"
    elif placement == "global" and placement_groups != 1:
        yield (
            f"placement_groups = {placement_groups} has no effect under placement = global: set it to 1, or placement "
            "to domain"
        )
    elif expert % placement_groups:
        yield (
            f"placement_groups = {placement_groups} does not divide expert = {expert}: every placement group needs "
            f"equally many ranks, so choose a divisor of {expert}"
        )


@dataclass(frozen=True)
class Coordinates:
    """Mesh coordinates of a rank: pipeline stage, expert part, data replica, tensor part."""

    stage: int
    expert: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """A grid of `data` x `expert` x `tensor` x `pipeline` ranks.

    `placement` "global": rows travel between all `expert` parts. "domain": the domains are divided into
    `placement_groups` runs of neighbours; a run's experts sit on `expert` / `placement_groups` neighbouring parts,
    whose ranks read that run's domains alone, so the exchange stays inside the group. Raises ValueError with the first
    of `mesh_problems`.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    placement: str = "global"
    placement_groups: int = 1

    def __post_init__(self) -> None:
        for sentence in mesh_problems(**vars(self)):
            raise ValueError(sentence)

    # --- sizes

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.expert * self.tensor * self.pipeline

    @property
    def axes(self) -> str:
        """The axes whose product is `size`, for sentences; tensor and pipeline where there are any."""
        rarer = {"tensor": self.tensor, "pipeline": self.pipeline}
        more = "".join(f" x {name} {ranks}" for name, ranks in rarer.items() if ranks > 1)
        return f"data {self.data} x expert {self.expert}{more}"

    @property
    def rows(self) -> int:
        """Row ranks: shards that a batch is divided into."""
        return self.data * self.expert

    @property
    def exchange_size(self) -> int:
        """Ranks between which the rows of one all-to-all travel."""
        return self.expert // self.placement_groups

    # --- ranks

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a rank. Raises ValueError outside the mesh."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.size} ranks")
        rest, tensor = divmod(rank, self.tensor)
        rest, data = divmod(rest, self.data)
        stage, expert = divmod(rest, self.expert)
        return Coordinates(stage, expert, data, tensor)

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at these coordinates."""
        row = (coordinates.stage * self.expert + coordinates.expert) * self.data + coordinates.data
        return row * self.tensor + coordinates.tensor

    def row_rank(self, rank: int) -> int:
        """Which of the `rows` parts of a batch a rank reads."""
        coordinates = self.coordinates(rank)
        return coordinates.expert * self.data + coordinates.data

    def placement_group(self, rank: int) -> int:
        """The placement group of a rank (0 under global placement)."""
        return self.coordinates(rank).expert // self.exchange_size

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the other tensor shards of the same weights and see the same rows."""
        start = rank - self.coordinates(rank).tensor
        return tuple(range(start, start + self.tensor))

    def exchange_group(self, rank: int) -> tuple[int, ...]:
        """Ranks between which this rank's rows travel to experts and back."""
        coordinates = self.coordinates(rank)
        first = self.placement_group(rank) * self.exchange_size
        return tuple(self.rank(replace(coordinates, expert=e)) for e in range(first, first + self.exchange_size))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold all experts together: this rank's exchange group and those of other placement groups."""
        coordinates = self.coordinates(rank)
        return tuple(self.rank(replace(coordinates, expert=e)) for e in range(self.expert))

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same shard of the same experts: their gradients are summed."""
        coordinates = self.coordinates(rank)
        return tuple(self.rank(replace(coordinates, data=d)) for d in range(self.data))

    def shared_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same shard of the shared parameters: their gradients are summed."""
        coordinates = self.coordinates(rank)
        return tuple(
            self.rank(replace(coordinates, expert=e, data=d)) for e in range(self.expert) for d in range(self.data)
        )

    def placement_rows(self, rank: int) -> range:
        """The row ranks of a rank's placement group: theirs are all rows that may come to its experts."""
        rows = self.exchange_size * self.data
        start = self.placement_group(rank) * rows
        return range(start, start + rows)

    # --- stages

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.rows * self.tensor

    def stage_of(self, layer: int, layers: int) -> int:
        """The stage that computes a layer: stages have equal runs of the `layers`."""
        return layer * self.pipeline // layers

    # --- experts and domains

    def expert_problems(self, sizes: Sequence[int], names: Sequence[str] | None = None) -> Iterator[str]:
        """Sentences as above for expert groups of these `sizes` (one per domain) that the mesh cannot divide."""
        total = sum(sizes)
        if total % self.expert:
            yield (
                f"expert = {self.expert} does not divide the {total} experts of a sparse layer: choose a divisor of "
                f"{total}, or change the domains' experts"
            )
            return
        share, reached = total // self.placement_groups, 0
        for domain, size in enumerate(sizes):
            if reached // share != (reached + size - 1) // share:
                name = names[domain] if names else str(domain)
                yield (
                    f"placement_groups = {self.placement_groups} cuts the domain {name} in two (a group has {share} of "
                    f"{total} experts): choose another number, or change the domains' order or experts"
                )
                return
            reached += size

    def experts_of(self, rank: int, experts: int) -> range:
        """Indices on a sparse layer's axis of `experts` of those that a rank holds (of each, its own tensor shard)."""
        if experts % self.expert:
            raise ValueError(next(self.expert_problems([experts])))
        share = experts // self.expert
        start = self.coordinates(rank).expert * share
        return range(start, start + share)

    def interleaved_experts_of(self, rank: int, experts: int) -> range:
        """The same where a placement group's experts are interleaved over its expert parts, as in an SPMD graph: part p
        of X has those at p, p + X, p + 2 X, … of the group's run."""
        share = len(self.experts_of(rank, experts))
        group, part = divmod(self.coordinates(rank).expert, self.exchange_size)
        start = group * share * self.exchange_size
        return range(start + part, start + share * self.exchange_size, self.exchange_size)

    def domains_of_groups(self, sizes: Sequence[int]) -> tuple[range, ...]:
        """Domain ids of each placement group, for expert groups of these `sizes`. Raises ValueError."""
        for sentence in self.expert_problems(sizes):
            raise ValueError(sentence)
        share = sum(sizes) // self.placement_groups
        groups, start, reached = [], 0, 0
        for domain, size in enumerate(sizes):
            reached += size
            if reached % share == 0:
                groups.append(range(start, domain + 1))
                start = domain + 1
        return tuple(groups)
