"""Placement of parameters: which device has which part of a parameter, as MindSpore's pass itself states it after a
compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallel.partition_spec import Slices


@dataclass(frozen=True)
class Placed:
    """Placement of one parameter on the devices of a stage. `devices`: sizes of the matrix over which a stage's ranks
    are counted, the last axis fastest. `cuts`: of each axis of the tensor the axis of `devices` that cuts it, counted
    from the last one backwards, -1 where it is whole. `dividing`: the ranks that divide the compiling rank's part
    further among them, along the first axis, in their order; () where none do.
    """

    devices: tuple[int, ...]
    cuts: tuple[int, ...]
    dividing: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[Sequence[int]]) -> Placed:
        """From what `placements` gave, read from JSON."""
        return cls(*map(tuple, values))

    def part(self, shape: Sequence[int], stage_rank: int) -> Slices:
        """The part of a tensor of this `shape` that the stage's rank `stage_rank` has before its holders divide it.
        Raises ValueError where an axis does not divide."""
        slices = []
        for size, cut in zip(shape, self.cuts, strict=True):
            shards, index = 1, 0
            if cut >= 0:
                shards = self.devices[len(self.devices) - 1 - cut]
                index = stage_rank // math.prod(self.devices[len(self.devices) - cut :]) % shards
            if size % shards:
                raise ValueError(f"an axis of {size} is not divided by {shards}")
            slices.append(slice(index * size // shards, (index + 1) * size // shards))
        return tuple(slices)


def placements(cell: Any) -> dict[str, tuple[Sequence[int], ...]]:
    """In the process that compiled `cell`: of every parameter what `Placed.of` reads."""
    from mindspore.communication import get_group_size, get_world_rank_from_group_rank

    groups: dict[str, tuple[int, ...]] = {"": ()}
    placed = {}
    for name, stated in cell.parameter_layout_dict.items():
        devices, cuts, group = stated[0], stated[1], stated[5]
        if group not in groups:
            groups[group] = tuple(get_world_rank_from_group_rank(group, i) for i in range(get_group_size(group)))
        placed[name] = (devices, cuts, groups[group])
    return placed
