"""CPU processes in the places of an Ascend mesh's devices: same slices, stores, plans and checkpoints, same results."""

import json
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from tests.pangu_sigma.training.distributed.test_worker_cases import (
    CAPACITY,
    GSHARD,
    NOISY,
    OLMOE,
    SHORT,
    SWITCH,
    assert_equals_one_process,
    results,
    run,
)
from tests.pangu_sigma.training.distributed.test_workers import assert_same_training
from tests.pangu_sigma.training.training_process import assert_refused, checkpoint, command

ROOM = {"dispatch": "capacity", "capacity_factor": 0.8}


def case(mesh: dict, steps: int = 3, store: str = "host", **more) -> dict:
    model = {**SHORT, "sparse": CAPACITY, **more.pop("model", {})}
    rate = {"learning_rate": 1e-3}
    more.setdefault("run", {"kernels": "composed"})
    return {"mesh": mesh, "emulate_mesh": True, "model": model, "experts": {"store": store}, "steps": steps,
            "optimizer": rate, **more}  # fmt: skip


EP2_TP2 = {"expert": 2, "tensor": 2}
# Micro-batches of one step that meet other domains share its slots, here of two domains of three.
PAIRS = ([0] * 4 + [1] * 4, [2, 2, 0, 0] * 2, [1] * 4 + [2] * 4)
STAGED = {
    "train": {"gradient_accumulation_steps": 2}, "data": {"max_domains_per_batch": 2},
    "domains": {"code": 4, "law": 4, "poems": 4},
    "drawn": {str(step): PAIRS[step % 3] for step in range(20)},
}  # fmt: skip


def staged(mesh: dict, steps: int = 3, **more) -> dict:
    """Pipeline stages of a layer each, both with experts."""
    model = {"layers": 2, "sparse": {**CAPACITY, "layers": 2}, **more.pop("model", {})}
    return case({"pipeline": 2, **mesh}, steps, model=model, **{**STAGED, **more})


FOUR = {
    # Of so many words that optimizer parallelism divides them (see `parallel.optimizer_sharding`).
    "cut": case(
        EP2_TP2, train={"gradient_accumulation_steps": 2}, model={"vocab_size": 1024},
        parallel={"optimizer_parallel": True}, domains={"code": 4, "law": 4, "poems": 4}, measured="law",
        saved_under=[EP2_TP2, {"data": 2, "tensor": 2}, {"expert": 4}],
    ),
}  # fmt: skip
PLACED = {"expert": 4, "placement": "domain", "placement_groups": 2}
APART = dict.fromkeys(map(str, range(20)), [0, 0, 0, 0, 1, 2, 2, 1])
FROZEN_BETWEEN = [{"steps": 5}, {"steps": 10, "shared": "frozen", "domains": ["code", "law"]}, {}]
STAGES = {"stages": staged({}, saved_under=[{"pipeline": 2}, {"tensor": 2}, {"expert": 2}])}
LONG = {
    "stages_expert": staged({"expert": 2}, 20, train={"gradient_accumulation_steps": 2, "phases": FROZEN_BETWEEN}),
    "stages_tensor": staged({"tensor": 2}, 20, parallel={"optimizer_parallel": True}, model={"vocab_size": 1024}),
    "stages_data": staged({"data": 2}, 20, model={"layers": 2, "query_layer": "next_position", "sparse": CAPACITY}),
    "four_stages": case(
        {"pipeline": 4}, 20, train={"gradient_accumulation_steps": 4},
        model={"layers": 4, "sparse": {**CAPACITY, "layers": 2}},
    ),
    "dp2_tp2": case({"data": 2, "tensor": 2}, 20),
    "ep2_dp2_device": case({"expert": 2, "data": 2}, 20, "device"),
    "tp4_sequence": case({"tensor": 4}, 20, model={"heads": 4}, parallel={"sequence_parallel": True}),
    "chunks": case(EP2_TP2, 20, parallel={"expert_chunks": 2}, domains={"code": 4, "law": 4, "poems": 4}),
    "hash": case(EP2_TP2, 20, model={"sparse": {"router": "hash", **ROOM}}),
    "placed": case(PLACED, 20, drawn=APART),
    "switch": case(EP2_TP2, 20, "device", model={"sparse": SWITCH}),
    "gshard": case({"data": 2, "tensor": 2}, 20, "device", model={"sparse": {**GSHARD, **ROOM}}),
    "noisy": case(EP2_TP2, 20, "device", model={"sparse": {**NOISY, **ROOM}}),
    "olmoe": case({"data": 2, "expert": 2}, 20, "device", model={"sparse": {**OLMOE, **ROOM}}),
    "dense": case({"data": 2, "tensor": 2}, 20, model={"sparse": {"layers": 0}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("emulated"), 4, FOUR)


@pytest.fixture(scope="module")
def staged_run(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("staged"), 2, STAGES)


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("emulated-long"), 4, LONG)


def test_a_mesh_trains_as_one_process_does(four):
    assert_equals_one_process(four, "cut", grown=10)
    # Each of four ranks writes its quarter of the words, and of each moment of theirs.
    for rank, tensors in enumerate(results(four, "cut")):
        words = [name for name in tensors if name.endswith(" embedding.word") or name.endswith(".embedding.word")]
        assert len(words) == 3 + 2 and all(tensors[w].shape[0] == 256 for w in words if w.startswith("tensor")), rank


def test_nothing_is_dropped_where_one_expert_gets_all_rows(four):
    """Text of one token alone asks a slot for more rows than the usual evaluation graph reserves."""
    alone = np.load(four / "cut-alone.npz")["measured"]
    for tensors in results(four, "cut"):
        np.testing.assert_allclose(tensors["measured"], alone, rtol=1e-5)
    assert (alone[3:] == 11 * 16).all()


def test_pipeline_stages_train_as_one_process_does(staged_run):
    assert_equals_one_process(staged_run, "stages", grown=10)
    # Each writes its own stage's parameters, moments and experts; routing tables are everybody's.
    for rank, tensors in enumerate(results(staged_run, "stages")):
        of_layers = {name.split(" ", 2)[2] for name in tensors if name.startswith("tensor") and "blocks." in name}
        written = {name.split("blocks.")[1][0] for name in of_layers if not name.endswith(".routing")}
        assert written == {str(rank)}


@pytest.mark.parametrize(("folder", "case"), [("four", "cut"), ("staged_run", "stages")])
def test_a_checkpoint_does_not_tell_how_its_experts_were_cut(request, folder, case):
    """Saved from halves of experts, then loaded as halves along the other axis, as wholes and by one process; saved by
    stages, then by other stages and without."""
    saved = sorted(request.getfixturevalue(folder).glob(f"{case}-saved*"))
    assert len(saved) == 5
    first, *others = [open_checkpoint(path / "checkpoints" / "step-00000001").manifest for path in saved]
    for other in others:
        # The configuration says which mesh it was.
        assert {p: f for p, f in other.files.items() if p != "config.yaml"} == {
            p: f for p, f in first.files.items() if p != "config.yaml"
        }
        assert other.tensors == first.tensors


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_twenty_steps_on_a_mesh_are_those_of_one_process(long, name):
    assert_equals_one_process(long, name, grown=20)


EVEN = [f"domains.{name}.experts=2" for name in ("code", "law", "poems")]
DIVIDED = [
    "model.layers=1", "model.query_layer=none", "model.dropout=0", "model.attention.dropout=0", *EVEN,
    "model.sparse.dispatch=capacity", "model.sparse.capacity_factor=0.8", "run.kernels=composed", "experts.store=host",
    "checkpoint.every=0", "evaluate.batches=1", "train.steps=8",
]  # fmt: skip
HALVES = ["parallel.expert=2", "parallel.tensor=2"]


def evaluations(run: Path) -> list[dict]:
    """What was measured, step by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], **line["losses"]} for line in lines if line["kind"] == "evaluate"]


def test_an_emulated_run_measures_saves_and_goes_on_anywhere(small_yaml, tmp_path):
    """On a mesh to step 6, then on in one process, as if there had been no mesh."""
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    done = command("train", small_yaml, f"run.dir={alone}", *DIVIDED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ["train", small_yaml, f"run.dir={cut}", *DIVIDED, *HALVES]
    done = command(*words, "train.stop_at=6", "--emulate-mesh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "emulates 4 devices" in done.stderr
    open_checkpoint(checkpoint(cut, 6)).verify()
    # One process measures it and cuts a domain out of it, without the mesh's graphs.
    done = command("evaluate", cut, "--batches", 1, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"step": 6, **json.loads(done.stdout)["losses"]} == pytest.approx(evaluations(cut)[-1], rel=1e-4)
    done = command("extract", cut, "--domain", "code", "--out", tmp_path / "code", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Largest logit difference 0.0" in done.stdout
    done = command("train", small_yaml, f"run.dir={cut}", *DIVIDED, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_training(checkpoint(alone, 8), checkpoint(cut, 8))
    emulated, other = evaluations(cut), evaluations(alone)
    assert [line["step"] for line in emulated] == [line["step"] for line in other] == [0, 6, 8]
    for line, expected in zip(emulated, other, strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def trained(run: Path) -> list[dict]:
    """Losses by domain of the text that was trained on, step by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_an_emulated_run_of_stages_saves_and_goes_on_anywhere(small_yaml, tmp_path):
    """In two stages to step 4, without them to step 6, in other stages to the end, as if there had been none; the
    checkpoint is measured by one process."""
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    common = [*DIVIDED, "model.layers=2", "evaluate.every=0", "train.gradient_accumulation_steps=2"]
    done = command("train", small_yaml, f"run.dir={alone}", *common, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ["train", small_yaml, f"run.dir={cut}", *common]
    stages = ["parallel.pipeline=2"]
    done = command(*words, *stages, "parallel.expert=2", "train.stop_at=4", "--emulate-mesh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "emulates 4 devices" in done.stderr
    open_checkpoint(checkpoint(cut, 4)).verify()
    done = command(*words, "train.stop_at=6", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command(*words, *stages, "parallel.tensor=2", "--emulate-mesh", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_training(checkpoint(alone, 8), checkpoint(cut, 8))
    emulated, other = trained(cut), trained(alone)
    assert len(emulated) == len(other) == 8
    for line, expected in zip(emulated, other, strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    done = command("evaluate", cut, "--batches", 1, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--emulate-mesh"], "parallel makes a mesh of 1 on CPU"),
        (["--emulate-mesh", "parallel.expert=2", "run.device=Ascend"], "leave out --emulate-mesh or run.device=Ascend"),
        (["parallel.tensor=2"], "unless parallel.emulate_mesh is true"),
        (["parallel.expert=2", "--emulate-mesh", "domains.law.data=[absent/*.jsonl]"], "no file matches"),
        (
            ["parallel.pipeline=2", "evaluate.every=0", "train.gradient_accumulation_steps=1", "--emulate-mesh"],
            "keeps 2 pipeline stages",
        ),
        (
            ["parallel.pipeline=2", "train.gradient_accumulation_steps=2", "--emulate-mesh"],
            "for which pipeline stages have no graph",
        ),
        (["parallel.expert=2", "--emulate-mesh", "--workers", 4], "parallel.workers = 4 is not the mesh's size 2"),
    ],
)
def test_what_cannot_be_emulated_is_refused(small_yaml, tmp_path, words, message):
    sizes = ["model.sparse.dispatch=capacity", "model.dropout=0", "model.attention.dropout=0", *EVEN]
    assert_refused(command("train", small_yaml, *sizes, *words, cwd=tmp_path), message)
