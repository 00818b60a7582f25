"""Cuts named in the model's cells become shard strategies of the mesh."""

from __future__ import annotations

from mindspore import ops

from parallel.layout import Layout, MeshLayout
from parallel.mesh import Mesh


def test_names_become_the_meshs_ways():
    layout = MeshLayout(Mesh(data=3, expert=4, tensor=2, placement="domain", placement_groups=2))
    cut = layout(ops.MatMul(), ("rows", 1), (1, "tensor"))
    assert cut.in_strategy == ((12, 1), (1, 2))
    six = layout(ops.Transpose(), ("group", "exchange", "data", 1, 1, 1))
    assert six.in_strategy == ((2, 2, 3, 1, 1, 1),)
    assert layout.native


def test_alone_nothing_is_cut():
    primitive = ops.MatMul()
    assert Layout()(primitive, ("rows", 1), (1, "tensor")) is primitive
    assert getattr(primitive, "in_strategy", None) is None
