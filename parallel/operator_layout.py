"""Operators are built with their layout: the one factory through which cells make primitives.

A cell never calls a Python operator where a layout matters; it asks its `Layout` for the primitive in `__init__` and
names how each input is cut over the mesh. Alone nothing is cut and the primitive comes back as it is, so one model
code serves one process and a mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel.mesh import Mesh
from parallel.partition_spec import AXES, Axis, Cut, axis_sizes, names_of, ways

# Operators that take the number of parts of each axis alone; they then number devices in the axes' order.
_COUNTS_ONLY = frozenset({"Concat", "Gather", "ReduceSum", "ReduceMax", "ReduceMean", "OneHot", "FlashAttentionScore",
                          "ArgMaxWithValue", "Select", "Slice", "TopK", "GatherD"})  # fmt: skip

# Environment of a process that compiles pipeline stages: a slice of an input is of the rows that the rank itself gives,
# its part of every micro-batch, one behind the other. Without it the ranks would gather each other's inputs first.
SLICES_STAY = {"PIPELINE_SLICE_SKIP_REDISTRIBUTION": "1"}


class Layout:
    """Makes primitives for one device: every tensor is whole, so a stated cut has no effect.

    `device` is "CPU" or "Ascend" and tells device-aware primitives which form to take; `kernels` is the path of the
    compiled CPU kernels (`ops.compiled_kernels.library`), which compute in float32 alone; None to compose everything of
    MindSpore's operators. `grouped`: a layer's experts are one grouped product. `stream` is the cut of the residual
    stream [T, D] between sublayers.
    """

    stream: Cut = ("rows", 1)

    def __init__(self, device: str = "CPU", kernels: str | None = None, grouped: bool = False) -> None:
        self.device = device
        self.kernels = kernels if device == "CPU" else None
        self.grouped = grouped

    @property
    def rows_by_slot(self) -> bool:
        """True where networks take rows as one list in the order of the slots, and where each slot ends."""
        return bool(self.kernels) or self.grouped

    @property
    def native(self) -> bool:
        """True where fused native operators are the fast form (Ascend); on CPU compositions are faster."""
        return self.device != "CPU"

    @property
    def meshed(self) -> Mesh | None:
        """The mesh over which one graph is cut; None where a graph is one process's own."""
        return None

    def __call__(self, primitive: Any, *cuts: Cut, out: Cut | None = None) -> Any:
        """Return `primitive` with its inputs cut as `cuts` say (one tuple per input, one entry per axis); `out`: its
        result cut otherwise than follows from them."""
        return primitive

    def part(self, shape: Sequence[int], cut: Cut) -> list[int]:
        """Shape of what one rank gives of a graph's input of this `shape`."""
        return list(shape)


class MeshLayout(Layout):
    """Makes primitives for the devices of a mesh, each with the shard strategy that its cuts mean.

    Names in a cut: "group" (placement groups), "exchange" (expert parts of a group), "data" and "tensor"; "rows" are
    the first three (all ranks that read samples), "expert" the first two. `sequence_parallel`: the residual stream is
    cut over the tensor axis too, which turns each sum over that axis into a scatter and a later gather.
    """

    def __init__(self, mesh: Mesh, device: str = "Ascend", sequence_parallel: bool = False) -> None:
        from mindspore.parallel.shard import Layout as Devices

        super().__init__(device)
        self.mesh = mesh
        self._devices = Devices(tuple(axis_sizes(mesh).values()), AXES)
        if sequence_parallel:
            self.stream = (("rows", "tensor"), 1)

    @property
    def meshed(self) -> Mesh | None:
        return self.mesh

    def __call__(self, primitive: Any, *cuts: Cut, out: Cut | None = None) -> Any:
        if not cuts:
            return primitive
        if primitive.name in _COUNTS_ONLY:
            return primitive.shard(tuple(tuple(self.ways(axis) for axis in cut) for cut in cuts))
        placed = tuple(self.placed(cut) for cut in cuts)
        return primitive.shard(placed) if out is None else primitive.shard(placed, (self.placed(out),))

    def ways(self, axis: Axis) -> int:
        """Into how many parts an axis is cut."""
        return ways(self.mesh, axis)

    def part(self, shape: Sequence[int], cut: Cut) -> list[int]:
        return [size // self.ways(axis) for size, axis in zip(shape, cut, strict=True)]

    def placed(self, cut: Cut) -> Any:
        """MindSpore's own statement of which device has which part of a tensor that is cut so."""
        named = (names_of(axis) for axis in cut)
        return self._devices(*(names if len(names) > 1 else (names[0] if names else "None") for names in named))


class RehearsedLayout(MeshLayout):
    """The same cells where no device is: a process computes the whole graph of a mesh, of whole tensors."""

    def __init__(self, mesh: Mesh) -> None:
        Layout.__init__(self, "CPU")
        self.mesh = mesh

    def __call__(self, primitive: Any, *cuts: Cut, out: Cut | None = None) -> Any:
        return primitive

    def part(self, shape: Sequence[int], cut: Cut) -> list[int]:
        return list(shape)
