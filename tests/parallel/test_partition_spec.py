"""Partition specs: slices are those of MindSpore's layouts, and every element is on the right number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.operator_layout import MeshLayout
from parallel.partition_spec import full_slices, num_shards, replicated_shard, shard_slices, slices_shape, unshard
from rre.dispatch.capacity_dispatch import PARAMETER_SPECS, WEIGHT_SPECS

MESHES = [
    Mesh(data=2, expert=2, tensor=2),
    Mesh(expert=4, tensor=2, placement="domain", placement_groups=2),
    Mesh(data=3, expert=4, tensor=2, placement="domain", placement_groups=2),
    Mesh(data=4),
]
SPECS = [("rows", 1), ("rows", "tensor"), ("tensor", "data"), (("tensor", "data"), "expert"), (1, ("data", "exchange"))]
SHAPE = (24, 48)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_shard_is_where_mindspores_layout_puts_it(mesh, spec):
    stated = MeshLayout(mesh).device_layout(spec).to_dict()
    devices = stated["device_matrix"]
    for rank in range(mesh.size):
        coordinates = np.unravel_index(rank, devices)
        slices = shard_slices(mesh, rank, SHAPE, spec)
        for size, axis, local in zip(SHAPE, stated["tensor_map"], slices, strict=True):
            # A tensor map counts the axes of the device matrix from the last one; -1 shards nothing.
            axes = [a for a in (axis if isinstance(axis, tuple) else (axis,)) if a >= 0]
            index, shards = 0, 1
            for a in axes:
                index = index * devices[-1 - a] + coordinates[-1 - a]
                shards *= devices[-1 - a]
            assert local == slice(index * size // shards, (index + 1) * size // shards)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_shards_make_up_the_tensor(mesh, spec):
    tensor = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    shards = [tensor[shard_slices(mesh, rank, SHAPE, spec)] for rank in range(mesh.size)]
    np.testing.assert_array_equal(unshard(shards, mesh, SHAPE, spec), tensor)
    assert shards[0].size * num_shards(mesh, spec[0]) * num_shards(mesh, spec[1]) == tensor.size


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_no_two_ranks_have_the_same_of_an_expert(mesh, name):
    """Over all ranks, the experts that each holds and its shard of them are every element once."""
    spec, experts = WEIGHT_SPECS[name], 24
    inner = SHAPE if len(spec) == 3 else SHAPE[:1]
    held = np.zeros((experts, *inner), int)
    for rank in range(mesh.size):
        for expert in mesh.interleaved_experts_of(rank, experts):
            held[(expert, *shard_slices(mesh, rank, inner, spec[1:]))] += 1
    assert (held == 1).all()


def test_an_axis_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="an axis of 10 is not divided by 4"):
        shard_slices(Mesh(data=2, tensor=2), 0, (10,), (("data", "tensor"),))


def test_full_slices_select_the_full_tensor():
    assert full_slices((3, 4)) == (slice(0, 3), slice(0, 4)) and slices_shape(full_slices((3, 4))) == (3, 4)


@pytest.mark.parametrize("name", PARAMETER_SPECS)
def test_of_equal_shards_of_an_expert_one_rank_is_the_writer(name):
    """In every stage each element is written once, and all that hold it count it once together."""
    mesh, spec, experts = Mesh(data=2, expert=4, tensor=2, pipeline=2), PARAMETER_SPECS[name], 8
    inner = SHAPE if len(spec) == 3 else SHAPE[:1]
    for stage in range(2):
        written, counted = np.zeros((experts, *inner), int), np.zeros((experts, *inner))
        for rank in range(stage * mesh.stage_size, (stage + 1) * mesh.stage_size):
            shard = replicated_shard(mesh, rank, inner, spec[1:])
            for expert in mesh.interleaved_experts_of(rank, experts):
                written[(expert, *shard.slices)] += shard.is_writer
                counted[(expert, *shard.slices)] += 1 / shard.gradient_copies
        assert (written == 1).all() and (counted == 1).all()
