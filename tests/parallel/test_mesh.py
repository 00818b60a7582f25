"""The mesh's arithmetic, by counting; no framework is imported."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from parallel.mesh import Mesh

MESHES = [
    Mesh(),
    Mesh(data=2, expert=4, tensor=2),
    Mesh(data=3, expert=2, tensor=1, pipeline=2),
    Mesh(expert=8, tensor=2, placement="domain", placement_groups=4),
    Mesh(data=2, expert=6, tensor=2, pipeline=2, placement="domain", placement_groups=3),
    Mesh(expert=64, tensor=8, placement="domain", placement_groups=8),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_coordinates_and_ranks_are_inverse(mesh):
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert len(set(coordinates)) == mesh.size == mesh.rows * mesh.tensor * mesh.pipeline
    assert [mesh.rank(one) for one in coordinates] == list(range(mesh.size))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("tensor_group", lambda m: m.tensor),
        ("exchange_group", lambda m: m.expert // m.placement_groups),
        ("replica_group", lambda m: m.data),
        ("shared_group", lambda m: m.data * m.expert),
    ],
)
def test_groups_of_a_kind_divide_the_ranks(mesh, kind, size):
    groups = {getattr(mesh, kind)(rank) for rank in range(mesh.size)}
    assert all(rank in getattr(mesh, kind)(rank) for rank in range(mesh.size))
    assert all(len(group) == size(mesh) for group in groups)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_an_exchange_group_holds_every_expert_of_the_domains_its_ranks_read(mesh):
    sizes = [2, 4, 2] * 24  # 192 experts; every mesh above divides them
    starts = [sum(sizes[:d]) for d in range(len(sizes))]
    experts, read = sum(sizes), mesh.domains_of_groups(sizes)
    for rank in range(0, mesh.size, 5):
        held = {e for other in mesh.exchange_group(rank) for e in mesh.experts_of(other, experts)}
        needed = {e for d in read[mesh.placement_group(rank)] for e in range(starts[d], starts[d] + sizes[d])}
        assert needed <= held
        assert len(held) == experts // mesh.placement_groups


def test_a_placement_group_is_a_run_of_ranks():
    mesh = Mesh(data=2, expert=4, tensor=2, placement="domain", placement_groups=2)
    assert [mesh.placement_group(rank) for rank in range(16)] == [0] * 8 + [1] * 8
    assert mesh.domains_of_groups([1, 3, 2, 2]) == (range(0, 2), range(2, 4))


def test_the_papers_exchange_groups():
    grouped = Mesh(expert=64, tensor=8, placement="domain", placement_groups=8)
    assert grouped.exchange_group(0) == (0, 8, 16, 24, 32, 40, 48, 56)
    assert grouped.tensor_group(9) == tuple(range(8, 16))
    assert len(Mesh(expert=64, tensor=8).exchange_group(0)) == 64
    assert len(grouped.experts_of(511, 640)) == 10 and grouped.experts_of(511, 640)[-1] == 639


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "data = 0 is no number of ranks"),
        ({"expert": 8, "placement": "domain", "placement_groups": 3}, "placement_groups = 3 does not divide expert"),
        ({"expert": 8, "placement_groups": 2}, "placement_groups = 2 has no effect under placement = global"),
        ({"placement": "random"}, "placement = random is unknown"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Mesh(**sizes)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="expert = 4 does not divide the 14 experts"):
        Mesh(expert=4).experts_of(0, 14)
    with pytest.raises(ValueError, match="cuts the domain 1 in two"):
        Mesh(expert=4, placement="domain", placement_groups=2).domains_of_groups([2, 4, 2])
    with pytest.raises(ValueError, match="rank 2 is not in a mesh of 2 ranks"):
        Mesh(data=2).coordinates(2)


def test_the_mesh_needs_no_framework():
    code = "import sys, parallel.mesh; assert not {'mindspore', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_axes_that_a_sentence_names_make_the_size():
    for mesh in MESHES:
        sizes = [int(word) for word in mesh.axes.split() if word.isdecimal()]
        assert math.prod(sizes) == mesh.size
