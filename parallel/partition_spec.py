"""Partition spec: which mesh axes shard each axis of a tensor, and which slices of it a rank has. No framework.

MindSpore's semi-auto-parallel pass shards a graph's tensors in the same way: the devices of a stage are numbered in the
order of `MESH_AXES`, and an axis that several names shard is sharded by the first of them first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from parallel.mesh import Mesh

# How one axis of a tensor is sharded: 1 for an axis that is not, a mesh axis, or several from the outermost inwards.
AxisSpec = int | str | tuple[str, ...]
# One entry per axis of a tensor.
PartitionSpec = tuple[AxisSpec, ...]
# The range of each axis of a tensor, every step 1.
Slices = tuple[slice, ...]

MESH_AXES = ("group", "exchange", "data", "tensor")
# Names that stand for several mesh axes: all ranks that read samples, and all parts of the expert axis.
_COMPOUND_AXES = {"rows": ("group", "exchange", "data"), "expert": ("group", "exchange")}


def mesh_axes_of(axis: AxisSpec) -> tuple[str, ...]:
    """The names of `MESH_AXES` that shard an axis."""
    if isinstance(axis, int):
        return ()
    names = (axis,) if isinstance(axis, str) else axis
    return tuple(mesh_axis for name in names for mesh_axis in _COMPOUND_AXES.get(name, (name,)))


def mesh_axis_sizes(mesh: Mesh) -> dict[str, int]:
    """The number of shards that each of `MESH_AXES` makes."""
    sizes = (mesh.placement_groups, mesh.exchange_size, mesh.data, mesh.tensor)
    return dict(zip(MESH_AXES, sizes, strict=True))


def num_shards(mesh: Mesh, axis: AxisSpec) -> int:
    """The number of shards of an axis."""
    sizes = mesh_axis_sizes(mesh)
    return math.prod(sizes[name] for name in mesh_axes_of(axis))


def shard_slices(mesh: Mesh, rank: int, shape: Sequence[int], spec: PartitionSpec) -> Slices:
    """The slices that a rank has of a tensor of this `shape`. Raises ValueError where an axis does not divide."""
    coordinates = mesh.coordinates(rank)
    group, exchange = divmod(coordinates.expert, mesh.exchange_size)
    by_axis = {"group": group, "exchange": exchange, "data": coordinates.data, "tensor": coordinates.tensor}
    sizes = mesh_axis_sizes(mesh)
    slices = []
    for size, axis in zip(shape, spec, strict=True):
        shards, index = 1, 0
        for name in mesh_axes_of(axis):
            shards, index = shards * sizes[name], index * sizes[name] + by_axis[name]
        if size % shards:
            raise ValueError(f"an axis of {size} is not divided by {shards}")
        length = size // shards
        slices.append(slice(index * length, (index + 1) * length))
    return tuple(slices)


def slices_shape(slices: Slices) -> tuple[int, ...]:
    """The shape of what the slices select."""
    return tuple(axis.stop - axis.start for axis in slices)


def full_slices(shape: Sequence[int]) -> Slices:
    """The slices that select all of a tensor of this `shape`."""
    return tuple(slice(0, size) for size in shape)


@dataclass(frozen=True)
class Shard:
    """What a rank has of a tensor of this full `shape`: the values at `slices`.

    `is_writer`: whether the rank writes the shard to a checkpoint, for all ranks that have the same;
    `gradient_copies`: how many of these have the shard's complete gradient.
    """

    shape: tuple[int, ...]
    slices: Slices
    is_writer: bool = True
    gradient_copies: int = 1


@dataclass(frozen=True)
class StageTensor:
    """A tensor of this full `shape` that the ranks of one pipeline `stage` have; `slices_of`: a rank's slices."""

    shape: tuple[int, ...]
    stage: int
    slices_of: Callable[[int], Slices]


def replicated_shard(mesh: Mesh, rank: int, shape: Sequence[int], spec: PartitionSpec) -> Shard:
    """The shard that a rank has of a tensor of one of its experts, where every rank with the same shard has all of its
    gradient; the first of them in a pipeline stage is the writer."""
    coordinates, slices = mesh.coordinates(rank), shard_slices(mesh, rank, shape, spec)
    start = coordinates.stage * mesh.stage_size
    replicas = [
        other for other in range(start, start + mesh.stage_size)
        if mesh.coordinates(other).expert == coordinates.expert and shard_slices(mesh, other, shape, spec) == slices
    ]  # fmt: skip
    return Shard(tuple(shape), slices, rank == replicas[0], len(replicas))


def unshard(shards: Sequence[np.ndarray], mesh: Mesh, shape: Sequence[int], spec: PartitionSpec) -> np.ndarray:
    """The tensor of this full `shape` from every rank's values; of equal shards the last rank's counts."""
    full = np.empty(shape, shards[0].dtype)
    for rank, values in enumerate(shards):
        full[shard_slices(mesh, rank, shape, spec)] = values
    return full
