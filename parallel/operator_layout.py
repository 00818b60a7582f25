"""Operator layout: the factory through which cells make primitives, each with its shard strategy on the mesh.

A cell never calls a Python operator where a layout matters; it asks its `Layout` for the primitive in `__init__` and
names the partition spec of each input. Without a mesh the primitive comes back as it is, so one model code serves one
process and a mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

from parallel.mesh import Mesh
from parallel.partition_spec import MESH_AXES, AxisSpec, PartitionSpec, mesh_axes_of, mesh_axis_sizes, num_shards

# Operators that take the number of shards of each axis alone; they then number devices in the axes' order.
_TAKE_COUNTS = frozenset({"Concat", "Gather", "ReduceSum", "ReduceMax", "ReduceMean", "OneHot", "FlashAttentionScore",
                          "ArgMaxWithValue", "Select", "Slice", "TopK", "GatherD"})  # fmt: skip

# A loop over tensors becomes calls inside calls: of a model of 40 layers, more than MindSpore's own limit.
NESTED_CALLS = 100_000
# Environment of a process that compiles pipeline stages: a slice of an input is of the rows that the rank itself gives,
# its shard of every micro-batch, one behind the other. Without it the ranks would gather each other's inputs first.
LOCAL_SLICES = {"PIPELINE_SLICE_SKIP_REDISTRIBUTION": "1"}


class Layout:
    """Makes primitives for one device: no tensor is sharded, so a partition spec has no effect.

    `device` is "CPU" or "Ascend" and tells device-aware primitives which form to take; `kernels` is the path of the
    compiled CPU kernels (`parallel.ops.compiled_kernels.library`), which compute in float32 alone; None to compose
    everything of MindSpore's operators. `grouped`: a layer's experts are one grouped product. `residual_spec`: the
    partition spec of the residual stream [T, D] between sublayers.
    """

    residual_spec: PartitionSpec = ("rows", 1)
    few_rows = False

    def __init__(self, device: str = "CPU", kernels: str | None = None, grouped: bool = False) -> None:
        self.device = device
        self.kernels = kernels if device == "CPU" else None
        self.grouped = grouped

    def for_few_rows(self) -> Self:
        """The same layout for graphs of few rows and without gradients, as decoding's: there a native LayerNorm is one
        operator instead of eight, and a plain product runs at the speed at which memory gives the matrix."""
        layout = copy(self)
        layout.few_rows = True
        return layout

    @property
    def product_kernels(self) -> str | None:
        """The compiled kernels of linear layers and dense feed-forward networks; None to compose them."""
        return None if self.few_rows else self.kernels

    @property
    def rows_by_slot(self) -> bool:
        """True where networks take rows as one list in the order of the slots, and where each slot ends."""
        return bool(self.kernels) or self.grouped

    @property
    def native(self) -> bool:
        """True where fused native operators are the fast form (Ascend); on CPU compositions are faster."""
        return self.device != "CPU"

    @property
    def spmd_mesh(self) -> Mesh | None:
        """The mesh over which one graph is sharded; None where a graph is one process's own."""
        return None

    def __call__(self, primitive: Any, *specs: PartitionSpec, out: PartitionSpec | None = None) -> Any:
        """Return `primitive` with its inputs sharded by `specs` (one per input); `out`: its result's spec, where it is
        not the one that follows from them."""
        return primitive

    def local_shape(self, shape: Sequence[int], spec: PartitionSpec) -> list[int]:
        """Shape of what one rank gives of a graph's input of this full `shape`."""
        return list(shape)


class MeshLayout(Layout):
    """Makes primitives for the devices of a mesh, each with the shard strategy of its partition specs.

    Names in a spec: "group" (placement groups), "exchange" (expert parts of a group), "data" and "tensor"; "rows" are
    the first three (all ranks that read samples), "expert" the first two. `sequence_parallel`: the residual stream is
    sharded over the tensor axis too, which turns each sum over that axis into a scatter and a later gather.
    """

    def __init__(self, mesh: Mesh, device: str = "Ascend", sequence_parallel: bool = False) -> None:
        from mindspore.parallel.shard import Layout as Devices

        super().__init__(device)
        self.mesh = mesh
        self._devices = Devices(tuple(mesh_axis_sizes(mesh).values()), MESH_AXES)
        if sequence_parallel:
            self.residual_spec = (("rows", "tensor"), 1)

    @property
    def spmd_mesh(self) -> Mesh | None:
        return self.mesh

    def __call__(self, primitive: Any, *specs: PartitionSpec, out: PartitionSpec | None = None) -> Any:
        if not specs:
            return primitive
        if primitive.name in _TAKE_COUNTS:
            return primitive.shard(tuple(tuple(self.num_shards(axis) for axis in spec) for spec in specs))
        layouts = tuple(self.device_layout(spec) for spec in specs)
        return primitive.shard(layouts) if out is None else primitive.shard(layouts, (self.device_layout(out),))

    def num_shards(self, axis: AxisSpec) -> int:
        """The number of shards of an axis."""
        return num_shards(self.mesh, axis)

    def local_shape(self, shape: Sequence[int], spec: PartitionSpec) -> list[int]:
        return [size // self.num_shards(axis) for size, axis in zip(shape, spec, strict=True)]

    def device_layout(self, spec: PartitionSpec) -> Any:
        """MindSpore's own form of a partition spec: which device has which slices."""
        named = (mesh_axes_of(axis) for axis in spec)
        return self._devices(*(names if len(names) > 1 else (names[0] if names else "None") for names in named))
