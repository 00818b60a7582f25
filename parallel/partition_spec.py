"""How a tensor is cut over a mesh, and which part of it a rank has: NumPy slices, no framework.

MindSpore's semi-auto-parallel pass cuts a graph's tensors in the same way: the devices of a stage are numbered in the
order of `AXES`, and an axis that several names cut is cut by the first of them first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.mesh import Mesh

# How one axis of a tensor is cut: 1 for an axis that is whole, a name, or several names from the outermost inwards.
Axis = int | str | tuple[str, ...]
# One entry per axis of a tensor.
Cut = tuple[Axis, ...]
# A part of a tensor: the range of each axis, every step 1.
Part = tuple[slice, ...]

AXES = ("group", "exchange", "data", "tensor")
_MEANING = {"rows": ("group", "exchange", "data"), "expert": ("group", "exchange")}


def names_of(axis: Axis) -> tuple[str, ...]:
    """The names of `AXES` that cut an axis."""
    if isinstance(axis, int):
        return ()
    names = (axis,) if isinstance(axis, str) else axis
    return tuple(meant for name in names for meant in _MEANING.get(name, (name,)))


def axis_sizes(mesh: Mesh) -> dict[str, int]:
    """Into how many parts each of `AXES` cuts."""
    sizes = (mesh.placement_groups, mesh.exchange_size, mesh.data, mesh.tensor)
    return dict(zip(AXES, sizes, strict=True))


def ways(mesh: Mesh, axis: Axis) -> int:
    """Into how many parts an axis is cut."""
    sizes = axis_sizes(mesh)
    return math.prod(sizes[name] for name in names_of(axis))


def part_of(mesh: Mesh, rank: int, shape: Sequence[int], cut: Cut) -> Part:
    """The part that a rank has of a tensor of this `shape`. Raises ValueError where an axis does not divide."""
    place = mesh.coordinates(rank)
    group, exchange = divmod(place.expert, mesh.exchange_size)
    at = {"group": group, "exchange": exchange, "data": place.data, "tensor": place.tensor}
    sizes = axis_sizes(mesh)
    found = []
    for size, axis in zip(shape, cut, strict=True):
        parts, number = 1, 0
        for name in names_of(axis):
            parts, number = parts * sizes[name], number * sizes[name] + at[name]
        if size % parts:
            raise ValueError(f"an axis of {size} is not divided by {parts}")
        share = size // parts
        found.append(slice(number * share, (number + 1) * share))
    return tuple(found)


def shape_of(part: Part) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(axis.stop - axis.start for axis in part)


def whole(shape: Sequence[int]) -> Part:
    """All of a tensor of this `shape` as a part."""
    return tuple(slice(0, size) for size in shape)


@dataclass(frozen=True)
class Share:
    """What a rank holds of a tensor: its `part` of the whole `shape`. `speaks`: whether it writes it down, for all
    ranks that hold the same; `holders`: how many of these have all of its gradient."""

    shape: tuple[int, ...]
    part: Part
    speaks: bool = True
    holders: int = 1


def share_of(mesh: Mesh, rank: int, shape: Sequence[int], cut: Cut) -> Share:
    """What a rank holds of a tensor of one of its experts, where every rank that holds the same part has all of its
    gradient; the first of them in a pipeline stage speaks."""
    place, part = mesh.coordinates(rank), part_of(mesh, rank, shape, cut)
    start = place.stage * mesh.stage_size
    same = [
        other for other in range(start, start + mesh.stage_size)
        if mesh.coordinates(other).expert == place.expert and part_of(mesh, other, shape, cut) == part
    ]  # fmt: skip
    return Share(tuple(shape), part, rank == same[0], len(same))


def assembled(parts: Sequence[np.ndarray], mesh: Mesh, shape: Sequence[int], cut: Cut) -> np.ndarray:
    """The tensor of this `shape` from every rank's part; of equal parts the last rank's counts."""
    found = np.empty(shape, parts[0].dtype)
    for rank, part in enumerate(parts):
        found[part_of(mesh, rank, shape, cut)] = part
    return found
