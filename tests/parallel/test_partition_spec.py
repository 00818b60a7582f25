"""Which part of a tensor a rank has: as MindSpore's layouts say, and every element on the right number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.operator_layout import MeshLayout
from parallel.partition_spec import assembled, part_of, shape_of, share_of, ways, whole
from rre.dispatch.capacity_dispatch import PARAMETER_CUTS, WEIGHT_CUTS

MESHES = [
    Mesh(data=2, expert=2, tensor=2),
    Mesh(expert=4, tensor=2, placement="domain", placement_groups=2),
    Mesh(data=3, expert=4, tensor=2, placement="domain", placement_groups=2),
    Mesh(data=4),
]
CUTS = [("rows", 1), ("rows", "tensor"), ("tensor", "data"), (("tensor", "data"), "expert"), (1, ("data", "exchange"))]
SHAPE = (24, 48)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_part_is_where_mindspores_layout_puts_it(mesh, cut):
    stated = MeshLayout(mesh).placed(cut).to_dict()
    devices = stated["device_matrix"]
    for rank in range(mesh.size):
        at = np.unravel_index(rank, devices)
        found = part_of(mesh, rank, SHAPE, cut)
        for size, axis, mine in zip(SHAPE, stated["tensor_map"], found, strict=True):
            # A tensor map counts the axes of the device matrix from the last one; -1 cuts nothing.
            axes = [a for a in (axis if isinstance(axis, tuple) else (axis,)) if a >= 0]
            number, parts = 0, 1
            for a in axes:
                number = number * devices[-1 - a] + at[-1 - a]
                parts *= devices[-1 - a]
            assert mine == slice(number * size // parts, (number + 1) * size // parts)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_parts_make_up_the_tensor(mesh, cut):
    tensor = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    parts = [tensor[part_of(mesh, rank, SHAPE, cut)] for rank in range(mesh.size)]
    np.testing.assert_array_equal(assembled(parts, mesh, SHAPE, cut), tensor)
    assert parts[0].size * ways(mesh, cut[0]) * ways(mesh, cut[1]) == tensor.size


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_CUTS)
def test_no_two_ranks_have_the_same_of_an_expert(mesh, name):
    """Over all ranks, the experts that each holds in turn and its part of them are every element once."""
    cut, experts = WEIGHT_CUTS[name], 24
    inner = SHAPE if len(cut) == 3 else SHAPE[:1]
    held = np.zeros((experts, *inner), int)
    for rank in range(mesh.size):
        for expert in mesh.experts_in_turn(rank, experts):
            held[(expert, *part_of(mesh, rank, inner, cut[1:]))] += 1
    assert (held == 1).all()


def test_an_axis_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="an axis of 10 is not divided by 4"):
        part_of(Mesh(data=2, tensor=2), 0, (10,), (("data", "tensor"),))


def test_a_whole_tensor_is_a_part_of_itself():
    assert whole((3, 4)) == (slice(0, 3), slice(0, 4)) and shape_of(whole((3, 4))) == (3, 4)


@pytest.mark.parametrize("name", PARAMETER_CUTS)
def test_of_equal_parts_of_an_expert_one_rank_speaks(name):
    """In every stage each element is written once, and all that hold it count it once together."""
    mesh, cut, experts = Mesh(data=2, expert=4, tensor=2, pipeline=2), PARAMETER_CUTS[name], 8
    inner = SHAPE if len(cut) == 3 else SHAPE[:1]
    for stage in range(2):
        written, counted = np.zeros((experts, *inner), int), np.zeros((experts, *inner))
        for rank in range(stage * mesh.stage_size, (stage + 1) * mesh.stage_size):
            share = share_of(mesh, rank, inner, cut[1:])
            for expert in mesh.experts_in_turn(rank, experts):
                written[(expert, *share.part)] += share.speaks
                counted[(expert, *share.part)] += 1 / share.holders
        assert (written == 1).all() and (counted == 1).all()
