"""Optimizer parallelism: the ranks that hold the same part of a parameter divide it among themselves.

Which parameters MindSpore's pass divides, and who has which part, was read from graphs that it compiled, and
test_compile_plan.py asks it again: all or nothing, along the first axis, in the order of the ranks.
Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from parallel.mesh import Mesh

# `parallel_optimizer_threshold` of MindSpore 2.9, which is of the whole tensor and not of a rank's part of it.
SMALLEST_BYTES = 64 * 1024


def holders(cut: Sequence[str | None], mesh: Mesh, rank: int) -> tuple[int, ...]:
    """The ranks of a rank's pipeline stage that hold the same part of a tensor as it does, in ascending order; `cut`
    names the mesh axis ("expert", "data", "tensor") that cuts each axis of the tensor, None where it is whole."""
    place = mesh.coordinates(rank)
    names = [name for name in cut if name is not None]
    start = place.stage * mesh.stage_size
    return tuple(
        other for other in range(start, start + mesh.stage_size)
        if all(getattr(mesh.coordinates(other), name) == getattr(place, name) for name in names)
    )  # fmt: skip


def optimizer_ways(shape: Sequence[int], cut: Sequence[str | None], mesh: Mesh, value_bytes: int = 4) -> int:
    """Into how many pieces a rank's part of a tensor of this whole `shape` is divided once more; 1: into none.

    A tensor of less than `SMALLEST_BYTES` stays as it is, and so does one whose parts have a number of rows that all
    their holders together do not divide.
    """
    ways = mesh.stage_size // math.prod(getattr(mesh, name) for name in cut if name is not None)
    rows = shape[0] // (1 if cut[0] is None else getattr(mesh, cut[0])) if shape else 1
    if math.prod(shape) * value_bytes < SMALLEST_BYTES or rows % ways:
        return 1
    return ways


def optimizer_part(
    shape: Sequence[int], cut: Sequence[str | None], mesh: Mesh, rank: int, value_bytes: int = 4
) -> tuple[int, int]:
    """(number, ways): of the `ways` equal pieces along the first axis of its part of a tensor of this whole `shape`,
    the one that a rank holds and updates; (0, 1) where it holds all of its part.

    The arguments are those of `optimizer_ways` and `holders`; a value takes `value_bytes`.
    """
    ways = optimizer_ways(shape, cut, mesh, value_bytes)
    return (0, 1) if ways == 1 else (holders(cut, mesh, rank).index(rank), ways)
