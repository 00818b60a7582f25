"""Optimizer-state sharding (MindSpore's optimizer parallelism): replicas of a parameter divide it among themselves.

Which parameters MindSpore's pass divides, and which rank has which shard, was read from graphs that it compiled, and
test_compile_plan.py compares it again: all replicas or none, along the first axis, in the order of the ranks.
Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from parallel.mesh import Mesh

# `parallel_optimizer_threshold` of MindSpore 2.9, which is of the full tensor and not of a rank's shard of it.
MIN_DIVIDED_BYTES = 64 * 1024


def replica_ranks(spec: Sequence[str | None], mesh: Mesh, rank: int) -> tuple[int, ...]:
    """The ranks of a rank's pipeline stage that compute with the same shard of a tensor, in ascending order.

    `spec` names the mesh axis ("expert", "data", "tensor") that shards each axis of the tensor, None where none does.
    """
    coordinates = mesh.coordinates(rank)
    names = [name for name in spec if name is not None]
    start = coordinates.stage * mesh.stage_size
    return tuple(
        other for other in range(start, start + mesh.stage_size)
        if all(getattr(mesh.coordinates(other), name) == getattr(coordinates, name) for name in names)
    )  # fmt: skip


def optimizer_num_shards(shape: Sequence[int], spec: Sequence[str | None], mesh: Mesh, value_bytes: int = 4) -> int:
    """Into how many optimizer shards a rank's shard of a tensor of this full `shape` is divided; 1: it is not.

    A tensor of less than `MIN_DIVIDED_BYTES` stays as it is, and so does one whose shards have a number of rows that
    their replicas together do not divide.
    """
    replicas = mesh.stage_size // math.prod(getattr(mesh, name) for name in spec if name is not None)
    rows = shape[0] // (1 if spec[0] is None else getattr(mesh, spec[0])) if shape else 1
    if math.prod(shape) * value_bytes < MIN_DIVIDED_BYTES or rows % replicas:
        return 1
    return replicas


def optimizer_shard_of(
    shape: Sequence[int], spec: Sequence[str | None], mesh: Mesh, rank: int, value_bytes: int = 4
) -> tuple[int, int]:
    """(index, number of optimizer shards): of the equal pieces along the first axis of its shard of a tensor of this
    full `shape`, the one that a rank stores and updates; (0, 1) where it stores all of its shard.

    The arguments are those of `optimizer_num_shards` and `replica_ranks`; a value takes `value_bytes`.
    """
    shards = optimizer_num_shards(shape, spec, mesh, value_bytes)
    return (0, 1) if shards == 1 else (replica_ranks(spec, mesh, rank).index(rank), shards)
