"""Several processes train as one does: loss, every gradient and the trained weights, to float32 rounding."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from parallel.launch import Launch
from tests.pangu_sigma.train.process import ROOT

SWITCH = {"router": "switch", "aux_loss_weight": 0.1, "dispatch": "capacity", "capacity_factor": 1.0, "jitter": 0.02}
GSHARD = {"router": "gshard", "aux_loss_weight": 0.1}
NOISY = {"router": "noisy_top_k", "top_k": 2, "importance_loss_weight": 0.1, "load_loss_weight": 0.1}
OLMOE = {"router": "olmoe", "top_k": 3, "aux_loss_weight": 0.1, "z_loss_weight": 0.01}
CHOICE = {"router": "expert_choice", "top_k": 2}
CAPACITY = {"dispatch": "capacity", "capacity_factor": 0.7, "resample": True}
DROPOUT = {"dropout": 0.1, "attention": {"dropout": 0.1}}

# One sparse layer is the whole model where time counts: graphs take seconds to compile.
SHORT = {"layers": 1, "query_layer": "none"}

TWO = {
    "switch": {
        "mesh": {"expert": 2}, "model": {**SHORT, "sparse": SWITCH}, "train": {"accumulation": 2}, "steps": 4,
        "poisoned": 3,
    },
    "slots": {
        "mesh": {"data": 2}, "experts": {"store": "host"}, "steps": 3,
        "model": {**SHORT, "sparse": CAPACITY, "embedding_slots": "per_domain"},
    },
}  # fmt: skip
FOUR = {
    "rre": {
        "mesh": {"data": 2, "expert": 2}, "model": {**SHORT, **DROPOUT}, "steps": 3,
        # In the second step the text is of one domain, whose experts one part has.
        "drawn": {"1": [0] * 8},
        "saved_under": [{"expert": 4}, {"data": 4}],
    },
}  # fmt: skip


def run(folder: Path, processes: int, cases: dict) -> Path:
    """Train the cases in real processes; their results lie in the folder."""
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [sys.executable, "-m", "tests.pangu_sigma.train.together", folder / "cases.json", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("GLOG_v", "4")
        with Launch([str(word) for word in words], processes, folder / "workers") as job:
            ended = job.wait()
    logs = "".join(path.read_text(errors="replace") for path in (folder / "workers").glob("rank-*.log"))
    assert not any(ended.codes), f"{ended}\n{logs}"
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("four"), 4, FOUR)


def results(folder: Path, case: str) -> list[dict[str, np.ndarray]]:
    """What each rank found."""
    paths = sorted(folder.glob(f"{case}-[0-9].npz"))
    return [dict(np.load(path)) for path in paths]


def assert_equals_one_process(folder: Path, case: str, grown: float = 1.0) -> None:
    """`grown`: how many times the rounding of the first few steps is allowed, after many."""
    ranks, alone = results(folder, case), dict(np.load(folder / f"{case}-alone.npz"))
    for mine in ranks:
        np.testing.assert_array_equal(mine["finite"], alone["finite"])
        np.testing.assert_allclose(mine["loss"], alone["loss"], rtol=2e-6 * grown)
        np.testing.assert_allclose(mine["norm"], alone["norm"], rtol=2e-5 * grown)
        np.testing.assert_array_equal(mine["tokens"], alone["tokens"])
        np.testing.assert_array_equal(mine["load"], alone["load"])
        np.testing.assert_array_equal(mine["touched"], alone["touched"])
    # Every gradient that one process has is on some rank, and equal wherever it is.
    seen = set()
    for mine in ranks:
        for name in (n for n in mine if n.startswith("gradient")):
            scale = max(np.abs(alone[name]).max(), 1e-3)
            np.testing.assert_allclose(mine[name], alone[name], atol=2e-5 * grown * scale, err_msg=name)
            seen.add(name)
    assert seen == {name for name in alone if name.startswith("gradient")}
    # The ranks' parts are every tensor once.
    whole = {name.split(" ", 2)[2]: tensor for name, tensor in alone.items() if name.startswith("tensor")}
    rows = dict.fromkeys(whole, 0)
    for mine in ranks:
        for label, part in mine.items():
            if label.startswith("tensor"):
                _, begin, name = label.split(" ", 2)
                if part.shape != whole[name].shape:
                    expected = whole[name][int(begin) : int(begin) + part.shape[0]]
                else:
                    expected = whole[name]
                rows[name] += part.size
                # Steps are as long as the learning rate whatever the gradient: where that is nearly 0 they may differ.
                np.testing.assert_allclose(part, expected, atol=2e-5 * grown, rtol=1e-4, err_msg=name)
    assert rows == {name: tensor.size for name, tensor in whole.items()}


@pytest.mark.parametrize("case", ["switch", "slots"])
def test_two_processes_train_as_one(two, case):
    assert_equals_one_process(two, case)


@pytest.mark.slow
def test_four_processes_train_as_one(four):
    assert_equals_one_process(four, "rre")


def test_a_number_that_is_not_finite_on_one_process_stops_the_step_on_all(two):
    for mine in results(two, "switch"):
        assert mine["finite"].tolist() == [True, True, True, False]


@pytest.mark.slow
def test_a_checkpoint_does_not_tell_how_many_processes_wrote_it(four):
    saved = sorted(path for path in four.glob("rre-saved*"))
    assert len(saved) == 4
    first, *others = [open_checkpoint(path / "checkpoints" / "step-00000001").manifest for path in saved]
    assert any("-of-" in path for path in first.files)
    for other in others:
        assert other.files == first.files and other.tensors == first.tensors
    for path in saved:
        open_checkpoint(path / "checkpoints" / "step-00000001").verify()


MESHES = {2: [{"data": 2}, {"expert": 2}], 4: [{"expert": 4}, {"data": 4}, {"data": 2, "expert": 2}]}
ROUTERS = {
    "rre": {}, "capacity": CAPACITY, "hash": {"router": "hash"}, "switch": SWITCH, "gshard": GSHARD,
    "glam": {**GSHARD, "router": "glam"}, "noisy": NOISY, "olmoe": OLMOE, "choice": CHOICE,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kernels"), [(2, "auto"), (2, "composed"), (4, "auto")])
def test_every_router_store_and_mesh_over_twenty_steps(tmp_path, processes, kernels):
    cases = {}
    for number, mesh in enumerate(MESHES[processes]):
        for name, sparse in ROUTERS.items():
            for store in ("device", "host") if name in ("rre", "capacity", "hash") else ("device",):
                cases[f"{name}_{store}_{number}"] = {
                    "mesh": mesh, "model": {**SHORT, "sparse": sparse}, "experts": {"store": store}, "steps": 20,
                    "run": {"kernels": kernels}, "optimizer": {"learning_rate": 1e-3},
                }  # fmt: skip
    placed = {"expert": processes, "placement": "domain", "placement_groups": 2}
    apart = dict.fromkeys(map(str, range(20)), [0, 0, 0, 0, 1, 2, 2, 1])
    cases["placed"] = {"mesh": placed, "drawn": apart, "steps": 20, "run": {"kernels": kernels}}
    run(tmp_path, processes, cases)
    for case in cases:
        assert_equals_one_process(tmp_path, case, grown=20)
