"""MindSpore's own pass on the training graphs of shipped configurations, and a wrong plan is caught, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pangu_sigma.cli import app
from pangu_sigma.config import load_config
from pangu_sigma.data.tokenizers.vocabulary_size import vocabulary_size
from pangu_sigma.errors import UserError
from pangu_sigma.model.tensor_parallel_layout import stored_slices_of
from pangu_sigma.plan.compile_plan import compile_graph, compile_plan, report
from pangu_sigma.plan.graph_check import layer_name_of, problems
from pangu_sigma.plan.memory_estimate import stage_bytes
from pangu_sigma.plan.traffic_estimate import all_to_all_bytes
from parallel.dry.compiled_graph import ancestors, operators

CONFIGS = Path(__file__).parents[3] / "configs"
SHALLOW = ("model.layers=3",)
OLMOE = (
    "model.norm=rmsnorm", "model.position=rope", "model.feed_forward=swiglu", "model.activation=silu",
    "model.head=untied", "model.biases=false", "model.query_layer=none", "model.attention={qk_norm: true}",
    "parallel.data=2", "parallel.expert_chunks=2",
)  # fmt: skip
STAGES = ("train.gradient_accumulation_steps=2", "train.batch_size=8")
DIVIDED_STAGES = ("model.layers=2", "model.sparse.layers=1", "parallel.optimizer_parallel=true")
OPTIONS = (
    "model.layers=4", "model.sparse.shared_expert=true", "train.recompute=true", "parallel.sequence_parallel=true",
    "parallel.optimizer_parallel=true", "parallel.expert=8", "parallel.tensor=4", "parallel.data=2",
    "parallel.placement_groups=4", "parallel.expert_chunks=2", "train.batch_size=32",
    # Rows that 64 ranks do not divide, and a bias of half a KiB less than what is divided.
    "model.positions=520", "model.ffn=16256",
)  # fmt: skip
DIVIDED = (
    "model.layers=2", "model.sparse.layers=1", "model.positions=516", "model.ffn=16384", "parallel.data=2",
    "parallel.optimizer_parallel=true",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("objdump")), reason="needs gcc and objdump")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(configuration, its compiled graph) by name of the configuration and overrides, each compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    graphs = {}

    def ask(name, *overrides, rank=0):
        key = (name, overrides, rank)
        if key not in graphs:
            config = load_config(CONFIGS / name, overrides)
            graphs[key] = (config, compile_graph(config, folder / str(len(graphs)), rank=rank))
        return graphs[key]

    return ask


def as_by_arithmetic(config, result):
    """Whether the exchanges move what the plan counts, which leaves out the rows that stay at home."""
    away = 1 - 1 / config.parallel.mesh.exchange_size
    graphs = config.train.gradient_accumulation_steps if config.parallel.pipeline == 1 else 1
    sent = sum(c["bytes"] * c["count"] for c in exchanges(result)) * away * graphs
    return sent == all_to_all_bytes(config)


def exchanges(result):
    return [c for c in result["collectives"] if c["kind"] == "AlltoAll"]


def test_a_dense_model_on_eight_devices(compiled):
    config, graph = compiled("eight_devices_dense.yaml", *SHALLOW)
    assert list(problems(config, graph)) == []
    result = report(config, graph)
    assert exchanges(result) == [] and result["experts"] == {}
    assert result["parameters"]["embedding.word"] == {"shape": [8192, 512], "shard": [4096, 512]}
    assert result["parameters"]["blocks.0.feed_forward.down.weight"]["shard"] == [1024, 512]


def test_global_placement_on_eight_devices(compiled):
    config, graph = compiled("eight_devices_global.yaml", *SHALLOW)
    assert list(problems(config, graph)) == []
    result = report(config, graph)
    assert {tuple(c["ranks"]) for c in exchanges(result)} == {(0, 2, 4, 6)}
    # Two sparse layers; any sample may be of any domain, so 16 experts x 160 rows x 4 samples of 512 float16 travel.
    assert [(c["count"], c["backward"], c["bytes"]) for c in exchanges(result)] == [
        (4, False, 16 * 160 * 4 * 512 * 2), (4, True, 16 * 160 * 4 * 512 * 2),
    ]  # fmt: skip
    assert as_by_arithmetic(config, result)
    assert result["experts"]["blocks.1.experts.up.weight/0"] == {"shape": [16, 512, 2048], "shard": [4, 512, 1024]}


def test_the_command_compiles_domain_placement_and_keeps_the_graphs(tmp_path):
    kept = tmp_path / "graphs"
    file = str(CONFIGS / "eight_devices_domain.yaml")
    command = ["plan", file, *SHALLOW, "--compile", "--json", "--graphs", str(kept)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)["compiled"]
    assert {tuple(c["ranks"]) for c in exchanges(result)} == {(0, 2)} and result["devices"] == 8
    assert sorted(path.name for path in kept.iterdir()) == ["rank_0", "standins"]
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_every_option_on_64_devices(compiled):
    config, graph = compiled("eight_devices_domain.yaml", *OPTIONS)
    assert list(problems(config, graph)) == []
    result = report(config, graph)
    assert config.parallel.mesh.size == 64
    # Two parts of each of two layers: twice forward, to the experts again in the recomputation, twice backward.
    assert sum(c["count"] for c in exchanges(result)) == 2 * 2 * (2 + 1 + 2)
    assert {tuple(c["ranks"]) for c in exchanges(result)} == {(0, 8)}
    assert as_by_arithmetic(config, result)
    kinds = {(c["kind"], tuple(c["ranks"])) for c in result["collectives"]}
    # Sums of the residual stream are scattered over the tensor ranks, and its parts gathered.
    assert {("ReduceScatter", (0, 1, 2, 3)), ("AllGather", (0, 1, 2, 3))} <= kinds
    shared = tuple(range(0, 64, 4))
    assert {("ReduceScatter", shared), ("AllGather", shared)} <= kinds
    assert result["parameters"]["blocks.0.attention.query.weight"]["shard"] == [512 // 16, 512 // 4]


@pytest.mark.parametrize(
    ("overrides", "rank", "pieces", "pieces_of_bias"), [(OPTIONS, 0, 16, 1), (DIVIDED, 13, 8, 8)], ids=["64", "16"]
)
def test_optimizer_parallelism_divides_what_is_planned(compiled, overrides, rank, pieces, pieces_of_bias):
    """Against MindSpore's own way to cut a whole tensor for a rank, and the gathers in its graph."""
    from mindspore import Tensor
    from mindspore.parallel._tensor import _load_tensor

    config, graph = compiled("eight_devices_domain.yaml", *overrides, rank=rank)
    assert list(problems(config, graph)) == []
    mesh, ways = config.parallel.mesh, {}
    for name, shape in graph.parameters.items():
        placed, whole = graph.placed[name], np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        theirs = _load_tensor(Tensor(whole), list(placed.devices), list(placed.cuts), list(shape), rank)
        if placed.dividing:
            theirs = np.split(theirs, len(placed.dividing))[placed.dividing.index(rank)]
        ours = stored_slices_of(name, shape, mesh, rank, True)
        assert np.array_equal(theirs, whole[ours]), name
        assert theirs.shape == graph.parameter_shards[name], name
        ways[name] = len(placed.dividing) or 1
    assert ways["embedding.word"] == ways["blocks.0.attention.query.weight"] == pieces
    # Of 63.5 and of 64 KiB; rows that the ranks do not divide; 2 KiB.
    assert next(w for n, w in ways.items() if n.endswith("feed_forward.up.bias")) == pieces_of_bias
    assert ways["embedding.position"] == ways["norm.gamma"] == 1
    gathered = {}
    for o in graph.operators:
        if o.instance.startswith("parallel_optimizer_allgather"):
            gathered.setdefault(o.parameter, set()).add(o.ranks)
    assert gathered == {n: {graph.placed[n].dividing} for n, divided in ways.items() if divided > 1}


def test_parts_with_another_rank_or_undivided_are_caught(compiled):
    config, graph = compiled("eight_devices_domain.yaml", *OPTIONS)
    other = dataclasses.replace(graph.placed["embedding.word"], devices=(4, 4, 4), cuts=(1, -1))
    moved = dataclasses.replace(graph, placed={**graph.placed, "embedding.word": other})
    assert list(problems(config, moved)) == [
        "of parameter embedding.word rank 1 has the part [0:2048, 0:512], not [2048:4096, 0:512]"
    ]
    fewer = dataclasses.replace(graph.placed["embedding.word"], dividing=(0, 4))
    divided = dataclasses.replace(graph, placed={**graph.placed, "embedding.word": fewer})
    messages = list(problems(config, divided))
    assert len(messages) == 1 and "embedding.word is divided among the ranks (0, 4), not (0, 4, 8," in messages[0]
    whole = load_config(CONFIGS / "eight_devices_domain.yaml", (*OPTIONS, "parallel.optimizer_parallel=false"))
    assert "parameter embedding.word is cut to (128, 512), not to (2048, 512)" in list(problems(whole, graph))


@pytest.mark.parametrize(
    "router", ["switch", "gshard", "olmoe", *(pytest.param(r, marks=pytest.mark.slow) for r in ("glam", "noisy_top_k"))]
)
def test_learned_gates_on_eight_devices(compiled, router):
    gate = (f"model.sparse.router={router}", "experts.store=device", "model.sparse.jitter=0.01")
    config, graph = compiled("eight_devices_global.yaml", *SHALLOW, *gate[: 3 if router == "switch" else 2])
    assert list(problems(config, graph)) == []
    result = report(config, graph)
    assert result["parameters"]["blocks.1.router.weight"] == {"shape": [512, 16], "shard": [512, 16]}
    assert {tuple(c["ranks"]) for c in exchanges(result)} == {(0, 2, 4, 6)} and as_by_arithmetic(config, result)
    products = [o for o in graph.operators if o.kind == "MatMul" and "router" in o.scope and not o.backward]
    assert products and all(kind == "Float32" for o in products for kind, _ in o.takes)


def test_olmoes_parts_on_sixteen_devices(compiled):
    config, graph = compiled("eight_devices_domain.yaml", *SHALLOW, *OLMOE)
    assert list(problems(config, graph)) == []
    result = report(config, graph)
    assert result["experts"]["blocks.2.experts.gate.weight/1"]["shard"] == [2, 256, 1024]
    assert result["parameters"]["head.word"]["shard"] == [4096, 512]


def test_pipeline_stages_hold_their_layers_and_hand_rows_on(compiled):
    graphs = []
    for stage in range(2):
        config, graph = compiled("eight_devices_pipeline.yaml", *STAGES, rank=4 * stage)
        assert list(problems(config, graph)) == []
        graphs.append(graph)
        # One sparse layer each, with two micro-batches; exchanges inside the stage.
        result = report(config, graph)
        assert {tuple(c["ranks"]) for c in exchanges(result)} == {(4 * stage, 4 * stage + 2)}
        assert sum(c["count"] for c in exchanges(result)) == 2 * (2 + 2)
        assert as_by_arithmetic(config, result)
        shards = graph.parameter_shards.items()
        held = sum(math.prod(shape) for name, shape in shards if not name.startswith("accu_grads."))
        assert 4 * held == stage_bytes(config, vocabulary_size(config), stage)["weights"]
    assert graphs[0].rank == 0 and graphs[1].rank == 4
    first, last = (graph.parameter_shards for graph in graphs)
    assert "blocks.1.experts.up.weight/0" in first and "blocks.1.norm1.gamma" not in last
    # The word table of the last stage is the first one's, so that only the first updates it.
    assert "embedding.word" in last and "embedding.word" not in report(config, graphs[1])["parameters"]
    rows = 2 * 512 * 512 * 4
    sent = Counter((c.kind, c.ranks, c.bytes) for c in graphs[0].collectives if c.kind in ("Send", "Receive"))
    assert sent == {
        ("Send", (4,), rows): 2, ("Receive", (4,), rows): 2,
        ("Send", (4,), 4096 * 512 * 4): 1, ("Receive", (4,), 4096 * 512 * 4): 1,
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_stages_divide_their_parameters(compiled, stage):
    config, graph = compiled("eight_devices_pipeline.yaml", *STAGES, *DIVIDED_STAGES, rank=4 * stage + 1)
    assert list(problems(config, graph)) == []
    words, weight = "embedding.word", ("query_layer" if stage else "blocks.0") + ".attention.key.weight"
    assert graph.parameter_shards.get(words) == (None if stage else (8192 // 2 // 2, 512))
    assert graph.placed[weight].dividing == (4 * stage + 1, 4 * stage + 3)
    if stage == 0:
        # A buffer is of all that the rank computes with, the gradient that comes out of it of what the rank holds.
        shards = graph.parameter_shards
        buffers = sum(math.prod(s) for n, s in shards.items() if n.startswith("accu_grads."))
        pieces = sum(math.prod(shards[n]) for n, p in graph.placed.items() if p.dividing and n in graph.parameters)
        counted = stage_bytes(config, vocabulary_size(config), stage)
        assert counted["gradients"] == 4 * (buffers + pieces)
        assert counted["weights"] == 4 * (sum(math.prod(s) for s in shards.values()) - buffers)
    # What is handed on is all of the tensor part, with both micro-batches, and so are its gradients.
    sent = [c for c in graph.collectives if c.kind == ("Receive" if stage else "Send") and c.bytes == 4096 * 512 * 4]
    assert len(sent) == 2
    # Ranks add up a gradient when the last micro-batch's has come.
    by_name = {operator.name: operator for operator in graph.operators}
    summed = {o.parameter: o for o in graph.operators if o.instance.startswith("grad_")}
    assert summed.keys() >= report(config, graph)["parameters"].keys()
    for name, o in summed.items():
        divided = bool(graph.placed[name].dividing)
        assert o.kind == ("ReduceScatter" if divided else "AllReduce")
        adding = [a for a in graph.operators if a.kind == "AssignAdd"]
        added = {a.name for a in adding if a.reads[0].endswith(f"_accu_grads.{name}")}
        assert len(added) == (4 if name == words else 2) and added <= ancestors(by_name, o.name), name


def test_a_stage_that_does_not_hand_its_rows_on_is_caught(compiled):
    config, graph = compiled("eight_devices_pipeline.yaml", *STAGES)
    elsewhere = dataclasses.replace(graph, graph=graph.graph.replace("dest_rank: I64(4)", "dest_rank: I64(5)"))
    messages = list(problems(config, elsewhere))
    assert "stage 0 has 0 Send of 2097152 bytes with rank 4 instead of 2" in messages
    assert "stage 0 has 2 Send of 2097152 bytes with rank 5 instead of 0" in messages


def test_a_stage_with_anothers_layers_is_caught(compiled):
    _, graph = compiled("eight_devices_pipeline.yaml", *STAGES)
    last = dataclasses.replace(graph, rank=4)
    messages = list(problems(compiled("eight_devices_pipeline.yaml", *STAGES)[0], last))
    assert "stage 1 holds blocks.0.norm1.gamma, which is another stage's" in messages
    assert "stage 1 lacks query_layer.norm1.gamma" in messages


def test_a_plan_of_another_placement_is_caught_by_layer(compiled):
    _, graph = compiled("eight_devices_global.yaml", *SHALLOW)
    host = ("experts.store=device",)
    domain = load_config(CONFIGS / "eight_devices_domain.yaml", (*SHALLOW, *host))
    messages = list(problems(domain, graph))
    assert "blocks.1 exchanges rows between 4 ranks, more than the 2 of its placement group" in messages


def test_an_expert_that_is_not_cut_as_planned_is_caught_by_layer(compiled):
    _, graph = compiled("eight_devices_global.yaml", *SHALLOW)
    other = load_config(CONFIGS / "eight_devices_global.yaml", (*SHALLOW, "parallel.tensor=1", "parallel.data=2"))
    messages = list(problems(other, graph))
    assert "blocks.1.experts.up.weight/0 comes in cut to (4, 512, 1024), not to (4, 256, 2048)" in messages
    assert any(s.startswith("blocks.1: an expert's products take weights of") for s in messages)
    assert "parameter embedding.word is cut to (4096, 512), not to (8192, 512)" in messages


def test_a_missing_exchange_is_caught_by_layer(compiled):
    config, graph = compiled("eight_devices_global.yaml", *SHALLOW)
    without = dataclasses.replace(graph, graph=graph.graph.replace(" = AlltoAll(", " = Reshape(", 1))
    assert list(problems(config, without)) == ["blocks.0 has 1 AllToAll forward instead of 2"]


def test_another_model_than_the_configurations_is_caught(compiled):
    _, graph = compiled("eight_devices_dense.yaml", *SHALLOW)
    deeper = load_config(CONFIGS / "eight_devices_dense.yaml", ("model.layers=4",))
    assert (
        "parameter blocks.2.norm1.gamma is missing in the graph and (512,) in the configuration's manifest"
        in list(problems(deeper, graph))
    )


def test_a_chunk_that_waits_for_another_is_caught(compiled):
    config, graph = compiled("eight_devices_domain.yaml", *OPTIONS)
    everything = [o for o in operators(graph.graph) if layer_name_of(o.scope) == "blocks.1" and not o.backward]
    product = next(o for o in everything if o.kind == "BatchMatMul")
    # In the graph's order: the first part's rows go and come back, then the second part's.
    sent = [o for o in everything if o.kind == "AlltoAll" and not o.recomputed][2]
    feeds = next(o for o in everything if o.name == sent.reads[0])
    told = f"\n  {sent.name}("
    at = graph.graph.index(told)
    line = graph.graph[at : graph.graph.index("\n", at + 1)]
    waiting = line.replace(f"AlltoAll({feeds.name})", f"AlltoAll({feeds.name}, {product.name})")
    assert waiting != line
    late = dataclasses.replace(graph, graph=graph.graph.replace(line, waiting, 1))
    assert any(s.startswith("blocks.1: 1 of 2 chunks of experts wait") for s in problems(config, late))


def test_what_cannot_be_compiled_is_said(tmp_path):
    for name, override, messages in (
        ("eight_devices_dense.yaml", "parallel={}", "needs more than one device"),
        ("quickstart.yaml", "parallel={data: 2, workers: 2}", "set run.device=Ascend"),
    ):
        config = load_config(CONFIGS / name, (override,))
        with pytest.raises(UserError, match=messages):
            compile_plan(config)
    command = ["plan", str(CONFIGS / "eight_devices_dense.yaml"), "--graphs", str(tmp_path / "kept")]
    alone = CliRunner().invoke(app, command)
    assert alone.exit_code == 2 and "add --compile" in alone.stderr


@pytest.mark.slow
def test_the_papers_model_on_512_devices(tmp_path):
    result = compile_plan(load_config(CONFIGS / "pangu_sigma_1085b.yaml"), tmp_path / "graphs")
    assert result["devices"] == 512 and result["peak_bytes"] < 8 * 2**30 and result["total_seconds"] < 300
    assert {tuple(c["ranks"]) for c in exchanges(result)} == {tuple(range(0, 64, 8))}
    up = result["experts"]["blocks.31.experts.up.weight/0"]
    assert up["shape"] == [8 * 16, 5120, 20480] and up["shard"] == [2, 5120, 2560]
