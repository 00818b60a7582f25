"""Operators are built with their layout: the one factory through which cells make primitives.

A cell never calls a Python operator where a layout matters; it asks its `Layout` for the primitive in `__init__` and
names how each input is cut over the mesh. Alone nothing is cut and the primitive comes back as it is, so one model
code serves one process and a mesh.
"""

from __future__ import annotations

from typing import Any

from parallel.mesh import Mesh

# One entry per axis of a tensor: 1 for an axis that is whole, or the name of the mesh's ways that cut it.
Cut = tuple[int | str, ...]


class Layout:
    """Makes primitives for one device: every tensor is whole, so a stated cut has no effect.

    `device` is "CPU" or "Ascend" and tells device-aware primitives which form to take; `kernels` is the path of the
    compiled CPU kernels (`parallel.compiled.library`), which compute in
    float32 alone; None to compose everything of MindSpore's operators.
    """

    def __init__(self, device: str = "CPU", kernels: str | None = None) -> None:
        self.device = device
        self.kernels = kernels if device == "CPU" else None

    @property
    def native(self) -> bool:
        """True where fused native operators are the fast form (Ascend); on CPU compositions are faster."""
        return self.device != "CPU"

    def __call__(self, primitive: Any, *cuts: Cut) -> Any:
        """Return `primitive` with its inputs cut as `cuts` say (one tuple per input, one entry per axis)."""
        return primitive


class MeshLayout(Layout):
    """Makes primitives for the devices of a mesh, each with the shard strategy that its cuts mean.

    Names in a cut: "rows" (all ranks that read samples), its factors "group" (placement groups), "exchange" (expert
    parts of a group) and "data" in this order, "expert" (group x exchange), and "tensor". MindSpore's
    semi-auto-parallel pass numbers devices by the order in which an operator's cuts name them, the unnamed ones
    innermost: cuts must keep the order above, with "tensor" last, for an operator to mean the mesh's own ranks.
    """

    def __init__(self, mesh: Mesh, device: str = "Ascend") -> None:
        super().__init__(device)
        self.mesh = mesh
        self.ways = {
            "rows": mesh.rows,
            "group": mesh.placement_groups,
            "exchange": mesh.exchange_size,
            "data": mesh.data,
            "expert": mesh.expert,
            "tensor": mesh.tensor,
        }

    def __call__(self, primitive: Any, *cuts: Cut) -> Any:
        if not cuts:
            return primitive
        return primitive.shard(tuple(tuple(self.ways.get(axis, axis) for axis in cut) for cut in cuts))
