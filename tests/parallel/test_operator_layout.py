"""Partition specs named in the model's cells become shard strategies of the mesh."""

from __future__ import annotations

from mindspore import ops

from parallel.mesh import Mesh
from parallel.operator_layout import Layout, MeshLayout


def test_axis_names_become_shard_strategies():
    layout = MeshLayout(Mesh(data=3, expert=4, tensor=2, placement="domain", placement_groups=2))
    sharded = layout(ops.MatMul(), ("rows", 1), (1, "tensor"))
    rows, columns = (part["tensor_map"] for part in sharded.in_layout)
    assert sharded.in_layout[0]["device_matrix"] == (2, 2, 3, 2)
    assert rows == ((3, 2, 1), -1) and columns == (-1, 0)
    counted = layout(ops.ReduceSum(), ("rows", "tensor"))
    assert counted.in_strategy == ((12, 2),)
    assert layout.local_shape((24, 6), ("rows", 1)) == [2, 6]
    assert layout.local_shape((8, 4), ("expert", ("tensor", "data"))) == [2, 0]
    assert layout.native and layout.spmd_mesh == layout.mesh


def test_a_sequence_parallel_residual_stream_is_sharded_over_tensor_ranks_too():
    assert MeshLayout(Mesh(data=2, tensor=2), sequence_parallel=True).residual_spec == (("rows", "tensor"), 1)
    assert MeshLayout(Mesh(data=2, tensor=2)).residual_spec == Layout().residual_spec == ("rows", 1)


def test_without_a_mesh_nothing_is_sharded():
    primitive = ops.MatMul()
    assert Layout()(primitive, ("rows", 1), (1, "tensor")) is primitive
    assert getattr(primitive, "in_strategy", None) is None
    assert Layout().local_shape((3, 4), ("rows", 1)) == [3, 4] and Layout().spmd_mesh is None
