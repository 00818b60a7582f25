"""How every tensor of the model is cut over the mesh: the same statement serves the plan and the compiled graph."""

from __future__ import annotations

import math

from pangu_sigma.config.parameter_counts import Shape, is_expert
from parallel import partition_spec
from parallel.mesh import Mesh
from parallel.optimizer_sharding import holders, optimizer_part, optimizer_ways
from parallel.partition_spec import Part

# Axes over which each axis of a tensor is cut, by the end of the tensor's name; all others are whole on every rank.
_ATTENTION = {".weight": (None, "tensor"), ".bias": ("tensor",)}
_DENSE = ("feed_forward", "shared_expert")
_CUTS = {
    "embedding.word": ("tensor", None),
    **{f"attention.{part}{end}": cut for part in ("query", "key", "value") for end, cut in _ATTENTION.items()},
    "attention.projection.weight": ("tensor", None),
    "head.word": ("tensor", None),
    **{f"{part}.gate.weight": (None, "tensor") for part in _DENSE},
    **{f"{part}.up.weight": (None, "tensor") for part in _DENSE},
    **{f"{part}.up.bias": ("tensor",) for part in _DENSE},
    **{f"{part}.down.weight": ("tensor", None) for part in _DENSE},
    "experts.gate.weight": ("expert", None, "tensor"),
    "experts.up.weight": ("expert", None, "tensor"),
    "experts.up.bias": ("expert", "tensor"),
    "experts.down.weight": ("expert", "tensor", None),
    "experts.down.bias": ("expert", None),
}


def cut_of(name: str, shape: Shape) -> tuple[str | None, ...]:
    """The mesh axis that cuts each axis of the tensor of this name, None where it is whole."""
    for end, cut in _CUTS.items():
        if name.endswith(end):
            return cut
    return (None,) * len(shape)


def ways(name: str, shape: Shape, mesh: Mesh) -> int:
    """Into how many different parts the tensor is cut (experts: of one layer's whole expert axis)."""
    return math.prod(getattr(mesh, axis) for axis in cut_of(name, shape) if axis is not None)


def part_of(name: str, shape: Shape, mesh: Mesh, rank: int) -> Part:
    """The part of the tensor of this name and whole `shape` that a rank computes with."""
    cut = tuple(1 if axis is None else axis for axis in cut_of(name, shape))
    return partition_spec.part_of(mesh, rank, shape, cut)


def held_part(name: str, shape: Shape, mesh: Mesh, rank: int, divided: bool) -> Part:
    """The part of the shared parameter of this name that a rank holds and updates; `divided`: whether
    `parallel.optimizer_parallel` is on."""
    part = part_of(name, shape, mesh, rank)
    if not divided:
        return part
    number, ways = optimizer_part(shape, cut_of(name, shape), mesh, rank)
    share = (part[0].stop - part[0].start) // ways
    start = part[0].start + number * share
    return (slice(start, start + share), *part[1:])


def held_by(name: str, shape: Shape, mesh: Mesh, rank: int, divided: bool) -> tuple[int, ...]:
    """The ranks of a pipeline stage that hold the same part as `rank`, itself among them, in ascending order."""
    cut = cut_of(name, shape)
    return (rank,) if divided and optimizer_ways(shape, cut, mesh) > 1 else holders(cut, mesh, rank)


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether the tensor enters a matrix product: it then has a copy in the compute type too."""
    return len(shape) == (3 if is_expert(name) else 2) and ".routing" not in name
