"""MindSpore's own semi-auto-parallel pass cuts the experts and puts the exchange where the mesh says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from parallel.dry.compiled_graph import collectives, last_graph, parameter_shards
from parallel.dry.dry_process import run_dry
from parallel.dry.stand_in_libraries import DryCompileError
from parallel.mesh import Mesh

LAYER = Path(__file__).with_name("sharded_sparse_layer.py")
SIZES = {"slots": 16, "capacity": 4, "hidden": 32, "inner": 64, "tokens": 256}
MESHES = [
    {"expert": 4, "tensor": 2},
    {"expert": 4, "tensor": 2, "placement": "domain", "placement_groups": 2},
    {"data": 2, "expert": 4, "placement": "domain", "placement_groups": 2},
    {"expert": 16, "tensor": 4, "placement": "domain", "placement_groups": 4},
]

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("objdump")), reason="needs gcc and objdump")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dry")


@pytest.mark.parametrize("numbers", MESHES, ids=lambda n: "-".join(f"{k}{v}" for k, v in n.items()))
def test_experts_are_cut_and_rows_travel_inside_their_group(folder, numbers):
    mesh = Mesh(**numbers)
    run_folder = folder / "-".join(str(v) for v in numbers.values())
    run_dry([str(LAYER), json.dumps({"mesh": numbers, **SIZES})], run_folder, mesh.size)
    graph = last_graph(run_folder / "graphs" / "rank_0")
    experts, inner = SIZES["slots"] // mesh.expert, SIZES["inner"] // mesh.tensor
    parts = parameter_shards(graph)
    assert parts["up"] == (experts, 32, inner) and parts["down"] == (experts, inner, 32)
    assert parts["up_bias"] == (experts, inner) and parts["down_bias"] == (experts, 32)
    exchanges = [c for c in collectives(graph) if c.kind == "AlltoAll"]
    assert [c.backward for c in exchanges] == [False, False, True, True]
    assert {c.ranks for c in exchanges} == {mesh.exchange_group(0)}
    # Every slot of the group takes 4 rows of a rank, float16.
    assert {c.bytes for c in exchanges} == {SIZES["slots"] // mesh.placement_groups * 4 * 32 * 2}
    sums = {c.ranks for c in collectives(graph) if c.kind == "AllReduce"}
    assert (mesh.tensor == 1 or mesh.tensor_group(0) in sums) and (mesh.data == 1 or mesh.replica_group(0) in sums)


def test_a_graph_that_mindspore_refuses_is_an_error_with_its_log(folder):
    with pytest.raises(DryCompileError, match=r"log\.txt"):
        run_dry([str(LAYER), json.dumps({"mesh": {"expert": 4}, **SIZES, "slots": 6})], folder / "refused", 4)


def test_no_graph_is_an_error(tmp_path):
    with pytest.raises(DryCompileError, match="holds no graph"):
        last_graph(tmp_path)
