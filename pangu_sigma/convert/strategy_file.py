"""MindSpore's strategy files: how every parameter of a parallel run was cut over its devices.

A file is one Protocol Buffers message (mindspore/train/node_strategy.proto), of which this reads

    ParallelStrategyMap { repeated ParallelLayoutItem parallel_layout_item = 3 }
    ParallelLayoutItem { string param_name = 1; ParallelLayouts parallel_layouts = 2 }
    ParallelLayouts { repeated DevMatrix dev_matrix = 1; repeated TensorMap tensor_map = 2;
                      int32 field = 5; int32 opt_weight_shard_step = 6; int32 opt_weight_shard_size = 7 }
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.convert.protobuf_wire import BYTES, VARINT, WireError, fields, numbers, signed
from pangu_sigma.errors import UserError
from pangu_sigma.regular_file import read_at_most

_MOST_BYTES, _MOST_DIMENSIONS, _MOST_DEVICES = 64 << 20, 32, 1 << 20

Box = tuple[tuple[int, int], ...]
"""Of each axis (begin, end): the part of a tensor that one device holds."""


@dataclass(frozen=True)
class ShardedLayout:
    """How one parameter is cut.

    `devices`: the device grid, rank = row-major place in it. `tensor_map`: of each axis of the tensor the axis of the
    grid that cuts it, counted from the grid's last one, or -1. `optimizer_ways`: ways in which the optimizer's sharding
    cuts axis 0 of that slice once more, over devices that would hold the same; -1 means over all of them, 0 not at all.
    """

    devices: tuple[int, ...]
    tensor_map: tuple[int, ...]
    optimizer_ways: int

    @property
    def device_count(self) -> int:
        """Devices that the parameter lies on."""
        return math.prod(self.devices)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Into how many parts each axis of the tensor is cut."""
        ways = [1 if index < 0 else self.devices[-1 - index] for index in self.tensor_map]
        if ways:
            ways[0] *= self._ways
        return tuple(ways)

    def full_shape(self, slice_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole tensor's shape, from a slice's."""
        return tuple(size * ways for size, ways in zip(slice_shape, self.cuts, strict=True))

    def box(self, rank: int, slice_shape: tuple[int, ...]) -> Box:
        """The part of the tensor that device `rank` holds as a slice of `slice_shape`.

        As MindSpore cuts: along the tensor map first; then axis 0 of what a device has, in the order of the devices
        that have the same (the grid's last axis runs fastest).
        """
        coordinates = []
        for size in reversed(self.devices):
            coordinates.insert(0, rank % size)
            rank //= size
        indices = [0 if axis < 0 else coordinates[-1 - axis] for axis in self.tensor_map]
        if indices:
            indices[0] = indices[0] * self._ways + self._place_among_equals(coordinates) % self._ways
        return tuple((index * size, (index + 1) * size) for index, size in zip(indices, slice_shape, strict=True))

    @property
    def _repeated(self) -> list[int]:
        """The axes of the grid along which devices would hold the same."""
        used = {len(self.devices) - 1 - index for index in self.tensor_map if index >= 0}
        return [axis for axis in range(len(self.devices)) if axis not in used]

    @property
    def _ways(self) -> int:
        if self.optimizer_ways == 0:
            return 1
        if self.optimizer_ways > 0:
            return self.optimizer_ways
        return math.prod(self.devices[axis] for axis in self._repeated)

    def _place_among_equals(self, coordinates: list[int]) -> int:
        index = 0
        for axis in self._repeated:
            index = index * self.devices[axis] + coordinates[axis]
        return index


def read_strategy(path: Path | str) -> dict[str, ShardedLayout]:
    """Parameter name -> how it is cut.

    Raises UserError, naming the file, unless it is a strategy file that can be followed.
    """
    path = Path(path)
    try:
        data = read_at_most(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a MindSpore strategy file") from error
    layouts: dict[str, ShardedLayout] = {}
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path} is no MindSpore strategy file (it is too large): give the one that came with it")
    try:
        for field_number, kind, value in fields(data):
            if field_number == 3 and kind == BYTES:
                name, layout = _item(value)
                layouts[name] = layout
    except (WireError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no MindSpore strategy file ({error}): give the one that came with it") from error
    if not layouts:
        raise UserError(f"{path} says of no parameter how it was cut: give the strategy file that came with the shards")
    counts = {layout.device_count for layout in layouts.values()}
    if len(counts) != 1:
        raise UserError(f"{path} has parameters on {sorted(counts)} devices: pipeline stages cannot be imported")
    return layouts


def _item(data: bytes) -> tuple[str, ShardedLayout]:
    name, layouts = "", b""
    for field_number, kind, value in fields(data):
        if field_number == 1 and kind == BYTES:
            name = value.decode()
        elif field_number == 2 and kind == BYTES:
            layouts = value
    devices: list[int] = []
    tensor_map: list[int] = []
    shard_step = shard_size = 0
    for field_number, kind, value in fields(layouts):
        if field_number in (1, 2) and kind == BYTES:
            dims = [n for inner, form, dim in fields(value) if inner == 1 for n in numbers(form, dim)]
            if (devices if field_number == 1 else tensor_map):
                raise WireError(f"cuts {name} in two ways")
            if len(dims) > _MOST_DIMENSIONS:
                raise WireError(f"cuts {name} along more axes than a tensor has")
            (devices if field_number == 1 else tensor_map).extend(dims)
        elif field_number == 5 and value:
            raise WireError(f"cuts {name} by field slices, which embedding tables of recommenders have")
        elif field_number in (6, 7) and kind != VARINT:
            raise WireError(f"does not say how the optimizer of {name} is sharded")
        elif field_number == 6:
            shard_step = signed(value)
        elif field_number == 7:
            shard_size = signed(value)
    if not name or not devices or any(size < 1 for size in devices):
        raise WireError(f"does not say on which devices {name or 'a parameter'} lies")
    if math.prod(devices) > _MOST_DEVICES:
        raise WireError(f"has {name} on {math.prod(devices)} devices")
    if any(not -1 <= index < len(devices) for index in tensor_map):
        raise WireError(f"cuts {name} along an axis that its devices do not have")
    layout = ShardedLayout(tuple(devices), tuple(tensor_map), shard_size if shard_step else 0)
    if layout.optimizer_ways > 0 and math.prod(devices) % math.prod(layout.cuts):
        raise WireError(f"shards the optimizer of {name} {shard_size} ways, which its devices do not allow")
    return name, layout
