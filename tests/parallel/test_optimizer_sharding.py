"""Optimizer-state sharding: every value of a shared parameter is updated by one rank, in the order of the ranks."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.optimizer_sharding import MIN_DIVIDED_BYTES, optimizer_num_shards, optimizer_shard_of, replica_ranks

MESH = Mesh(data=2, expert=2, tensor=2, pipeline=2)


def test_replica_ranks_are_the_ranks_of_the_stage_with_the_same_coordinates():
    assert replica_ranks((None, "tensor"), MESH, 3) == (1, 3, 5, 7)
    assert replica_ranks((None, None), MESH, 3) == tuple(range(8))
    assert replica_ranks(("tensor",), MESH, 8 + 4) == (8, 10, 12, 14)
    assert replica_ranks(("expert", "tensor"), MESH, 5) == (5, 7)


@pytest.mark.parametrize("spec", [("tensor", None), (None, "tensor"), (None, None)])
def test_optimizer_shards_cover_a_stages_tensor_once(spec):
    shape = (128, 256)
    shards = optimizer_num_shards(shape, spec, MESH)
    assert shards == (8 if spec == (None, None) else 4)
    counted = np.zeros(shape, int)
    for rank in range(8, 16):
        index, of = optimizer_shard_of(shape, spec, MESH, rank)
        tensor = MESH.coordinates(rank).tensor
        rows, columns = map(np.arange, shape)
        if spec[0]:
            rows = np.split(rows, 2)[tensor]
        if spec[1]:
            columns = np.split(columns, 2)[tensor]
        counted[np.ix_(np.split(rows, of)[index], columns)] += 1
    assert of == shards and (counted == 1).all()


def test_small_tensors_and_rows_that_do_not_divide_stay():
    assert optimizer_num_shards((128, 128), (None, None), MESH) == 8
    assert optimizer_num_shards((128, 128), (None, None), MESH, value_bytes=2) == 1
    assert optimizer_num_shards((127, 1024), (None, None), MESH) == 1
    assert optimizer_num_shards((MIN_DIVIDED_BYTES // 4,), ("tensor",), MESH) == 4
    assert optimizer_num_shards((MIN_DIVIDED_BYTES // 4 - 8,), ("tensor",), MESH) == 1
    # 136 rows are divided by 8, the 68 of a tensor part by 4; 132 are divided by 4, their 66 are not.
    assert optimizer_num_shards((136, 1024), ("tensor", None), MESH) == 4
    assert optimizer_num_shards((132, 1024), ("tensor", None), MESH) == 1
    assert optimizer_shard_of((132, 1024), ("tensor", None), MESH, 3) == (0, 1)


def test_one_process_divides_nothing():
    assert optimizer_shard_of((1024, 1024), (None, None), Mesh(), 0) == (0, 1)
