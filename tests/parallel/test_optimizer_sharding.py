"""Who updates which piece of a shared parameter: every value is one rank's, in the order of the ranks."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.optimizer_sharding import SMALLEST_BYTES, holders, optimizer_part, optimizer_ways

MESH = Mesh(data=2, expert=2, tensor=2, pipeline=2)


def test_holders_are_the_ranks_of_the_stage_with_the_same_coordinates():
    assert holders((None, "tensor"), MESH, 3) == (1, 3, 5, 7)
    assert holders((None, None), MESH, 3) == tuple(range(8))
    assert holders(("tensor",), MESH, 8 + 4) == (8, 10, 12, 14)
    assert holders(("expert", "tensor"), MESH, 5) == (5, 7)


@pytest.mark.parametrize("cut", [("tensor", None), (None, "tensor"), (None, None)])
def test_pieces_cover_a_stages_tensor_once(cut):
    shape = (128, 256)
    ways = optimizer_ways(shape, cut, MESH)
    assert ways == (8 if cut == (None, None) else 4)
    counted = np.zeros(shape, int)
    for rank in range(8, 16):
        number, of = optimizer_part(shape, cut, MESH, rank)
        tensor = MESH.coordinates(rank).tensor
        rows, columns = map(np.arange, shape)
        if cut[0]:
            rows = np.split(rows, 2)[tensor]
        if cut[1]:
            columns = np.split(columns, 2)[tensor]
        counted[np.ix_(np.split(rows, of)[number], columns)] += 1
    assert of == ways and (counted == 1).all()


def test_small_tensors_and_rows_that_do_not_divide_stay():
    assert optimizer_ways((128, 128), (None, None), MESH) == 8
    assert optimizer_ways((128, 128), (None, None), MESH, value_bytes=2) == 1
    assert optimizer_ways((127, 1024), (None, None), MESH) == 1
    assert optimizer_ways((SMALLEST_BYTES // 4,), ("tensor",), MESH) == 4
    assert optimizer_ways((SMALLEST_BYTES // 4 - 8,), ("tensor",), MESH) == 1
    # 136 rows are divided by 8, the 68 of a tensor part by 4; 132 are divided by 4, their 66 are not.
    assert optimizer_ways((136, 1024), ("tensor", None), MESH) == 4
    assert optimizer_ways((132, 1024), ("tensor", None), MESH) == 1
    assert optimizer_part((132, 1024), ("tensor", None), MESH, 3) == (0, 1)


def test_alone_nothing_is_divided():
    assert optimizer_part((1024, 1024), (None, None), Mesh(), 0) == (0, 1)
