"""Several processes train as one does: loss, every gradient and the trained weights, to float32 rounding."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import open_checkpoint
from parallel.comm.launch import Launch
from rre.router_specs import ROUTER_SPECS
from tests.pangu_sigma.training.training_process import ROOT, UNSEEN

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
        "mesh": {"expert": 2}, "model": {**SHORT, "sparse": SWITCH}, "train": {"gradient_accumulation_steps": 2},
        "steps": 4, "poisoned": 3,
    },
    "slots": {
        "mesh": {"data": 2}, "experts": {"store": "host"}, "steps": 3,
        "model": {**SHORT, "sparse": CAPACITY, "domain_parameters": {"embedding": "own"}},
    },
}  # fmt: skip


def run(folder: Path, processes: int, cases: dict) -> Path:
    """Train the cases in real processes; their results lie in the folder."""
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [sys.executable, "-m", "tests.pangu_sigma.training.distributed.worker_cases", folder / "cases.json", folder]
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


def results(folder: Path, case: str) -> list[dict[str, np.ndarray]]:
    """What each rank found."""
    paths = sorted(folder.glob(f"{case}-[0-9].npz"))
    return [dict(np.load(path)) for path in paths]


def assert_equals_one_process(folder: Path, case: str, grown: float = 1.0) -> None:
    """`grown`: how many times the rounding of the first few steps is allowed, after many."""
    ranks, alone = results(folder, case), dict(np.load(folder / f"{case}-alone.npz"))
    for tensors in ranks:
        np.testing.assert_array_equal(tensors["finite"], alone["finite"])
        np.testing.assert_allclose(tensors["loss"], alone["loss"], rtol=2e-6 * grown)
        np.testing.assert_allclose(tensors["norm"], alone["norm"], rtol=2e-5 * grown)
        np.testing.assert_array_equal(tensors["tokens"], alone["tokens"])
        np.testing.assert_array_equal(tensors["load"], alone["load"])
        np.testing.assert_array_equal(tensors["touched"], alone["touched"])
        np.testing.assert_allclose(tensors["figures"], alone["figures"], rtol=1e-4 * grown)
    # Every gradient that one process has is on some rank, and equal wherever it is.
    seen: dict[str, np.ndarray] = {}
    for tensors in ranks:
        for name in (n for n in tensors if n.startswith("gradient")):
            scale = max(np.abs(alone[name]).max(), 1e-3)
            there = ~np.isnan(tensors[name])
            seen[name] = seen.get(name, False) | there
            if name.endswith(UNSEEN):
                continue
            np.testing.assert_allclose(
                tensors[name][there], alone[name][there], atol=2e-5 * grown * scale, err_msg=name
            )
    assert seen.keys() == {name for name in alone if name.startswith("gradient")}
    assert all(there.all() for there in seen.values())
    # The ranks' parts are every tensor once.
    full = {name.split(" ", 2)[2]: tensor for name, tensor in alone.items() if name.startswith("tensor")}
    rows = dict.fromkeys(full, 0)
    for tensors in ranks:
        for label, part in tensors.items():
            if label.startswith("tensor"):
                _, begin, name = label.split(" ", 2)
                starts = map(int, filter(None, begin.split(",")))
                expected = full[name][tuple(slice(b, b + n) for b, n in zip(starts, part.shape, strict=True))]
                rows[name] += part.size
                if name.endswith(UNSEEN):
                    continue
                # Steps are as long as the learning rate whatever the gradient: where that is nearly 0 they may differ.
                np.testing.assert_allclose(part, expected, atol=2e-5 * grown, rtol=1e-4, err_msg=name)
    assert rows == {name: tensor.size for name, tensor in full.items()}


@pytest.mark.parametrize("case", ["switch", "slots"])
def test_two_processes_train_as_one(two, case):
    assert_equals_one_process(two, case)


def test_a_number_that_is_not_finite_on_one_process_stops_the_step_on_all(two):
    for tensors in results(two, "switch"):
        assert tensors["finite"].tolist() == [True, True, True, False]


MESHES = {
    "dp2": {"data": 2}, "ep2": {"expert": 2},
    "dp4": {"data": 4}, "ep4": {"expert": 4}, "dp2_ep2": {"data": 2, "expert": 2},
}  # fmt: skip
SPARSE = {
    "rre": {}, "rre_capacity": CAPACITY, "hash": {"router": "hash"}, "switch": SWITCH, "gshard": GSHARD,
    "glam": {**GSHARD, "router": "glam"}, "noisy": NOISY, "olmoe": OLMOE, "choice": CHOICE,
}  # fmt: skip
MIXTURES = {"mixture": "competitive", "cooperative": "cooperative"}
# What meets what over twenty steps: every router and store, dropless and by capacity, on both numbers of processes.
COVERED = {
    "dp2": ["rre device", "rre_capacity host", "olmoe device", "glam device", "cooperative device"],
    "ep2": ["rre host", "rre_capacity device", "hash device", "switch device", "gshard device", "noisy device",
            "choice device", "mixture device"],
    "dp4": ["rre host", "noisy device"],
    "ep4": ["rre device", "rre_capacity host", "olmoe device"],
    "dp2_ep2": ["rre_capacity device", "hash host", "switch device", "gshard device", "glam device", "choice device",
                "mixture device"],
}  # fmt: skip
COMPOSED = {"dp2": ["olmoe device"], "ep2": ["rre device", "switch device"]}


def twenty_steps(mesh: str, what: str, kernels: str = "auto") -> dict:
    layer, store = what.split()
    if layer in MIXTURES:
        model = {**SHORT, "top_layer": "mixture", "mixture_loss": MIXTURES[layer], "sparse": {"layers": 0}}
    else:
        model = {**SHORT, "sparse": SPARSE[layer]}
    return {
        "mesh": MESHES[mesh], "model": model, "experts": {"store": store}, "steps": 20,
        "run": {"kernels": kernels}, "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip


def of_matrix(matrix: dict[str, list[str]], *meshes: str, kernels: str = "auto") -> dict[str, dict]:
    """Name -> case, of these meshes."""
    return {
        f"{mesh}_{what.replace(' ', '_')}_{kernels}": twenty_steps(mesh, what, kernels)
        for mesh in meshes
        for what in matrix[mesh]
    }


def placed(mesh: dict) -> dict:
    """Two placement groups: the first reads code alone and has its four experts, the second law and poems."""
    domains_of_steps = dict.fromkeys(map(str, range(20)), [0, 0, 0, 0, 1, 2, 2, 1])
    return {
        "mesh": {**mesh, "placement": "domain", "placement_groups": 2}, "model": {**SHORT, "sparse": {}},
        "drawn": domains_of_steps, "steps": 20, "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip


HELD = {
    "model": {**SHORT, "sparse": {"resample": True}}, "steps": 4, "train": {"gradient_accumulation_steps": 2},
    "held": {"output": 0.5, "l2": 0.1, "ewc": 5.0},
}  # fmt: skip
DONE = "done"
# Name -> number of processes and the cases that they train one after the other.
JOBS = {
    "two": (2, {
        **of_matrix(COVERED, "dp2", "ep2"), **of_matrix(COMPOSED, "dp2", "ep2", kernels="composed"),
        "placed": placed({"expert": 2}),
    }),
    "four": (4, {
        **of_matrix(COVERED, "ep4", "dp4"),
        "saved": {
            "mesh": MESHES["ep4"], "model": {**SHORT, **DROPOUT}, "steps": 3,
            # In the second step the text is of one domain, whose experts two parts have.
            "drawn": {"1": [0] * 8},
            "saved_under": [MESHES["ep4"], MESHES["dp2_ep2"], MESHES["dp4"]],
        },
        "placed": placed({"expert": 4}),
    }),
    "mixed": (4, {
        **of_matrix(COVERED, "dp2_ep2"),
        "held": {"mesh": MESHES["dp2_ep2"], **HELD},
        "placed": placed({"expert": 2, "data": 2}),
    }),
}  # fmt: skip


def test_every_router_trains_in_two_processes_and_in_four():
    for size in (2, 4):
        cases = [case for processes, several in JOBS.values() for case in several.values() if processes == size]
        models = [case["model"] for case in cases]
        routers = {model.get("sparse", {}).get("router", "rre") for model in models if "top_layer" not in model}
        assert routers == set(ROUTER_SPECS) and any("top_layer" in model for model in models)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Callable[[str], Path]:
    """Name -> where the results of a job's cases are; each runs once, also where it fails."""
    folders: dict[str, Path] = {}

    def results_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            run(folders[name], *JOBS[name])
            (folders[name] / DONE).touch()
        assert (folders[name] / DONE).exists(), f"the job {name} has failed"
        return folders[name]

    return results_of


@pytest.mark.slow
@pytest.mark.parametrize(("job", "case"), [(job, case) for job, (_, cases) in JOBS.items() for case in cases])
def test_twenty_steps_are_those_of_one_process(jobs, job, case):
    assert_equals_one_process(jobs(job), case, grown=20)


@pytest.mark.slow
def test_a_checkpoint_does_not_tell_how_many_processes_wrote_it(jobs):
    """Saved by four parts, then loaded by four, two and one, and by one process, and saved again by each."""
    saved = sorted(path for path in jobs("four").glob("saved-saved*"))
    assert len(saved) == 5
    first, *others = [open_checkpoint(path / "checkpoints" / "step-00000001").manifest for path in saved]
    assert any("-of-" in path for path in first.files)
    for other in others:
        assert other.files == first.files and other.tensors == first.tensors
    for path in saved:
        open_checkpoint(path / "checkpoints" / "step-00000001").verify()


@pytest.mark.slow
def test_the_fisher_information_of_several_processes_is_that_of_one(jobs):
    ranks, alone = results(jobs("mixed"), "held"), dict(np.load(jobs("mixed") / "held-alone.npz"))
    names = [name for name in alone if name.startswith("fisher ") and not name.endswith(UNSEEN)]
    assert names and all(alone[name].max() > 0 for name in names)
    for tensors in ranks:
        for name in names:
            np.testing.assert_allclose(
                tensors[name], alone[name], rtol=1e-3, atol=1e-5 * alone[name].max(), err_msg=name
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "groups"), [("two", [{0}, {1}]), ("four", [{0, 1}, {2, 3}]), ("mixed", [{0, 1}, {2, 3}])]
)
def test_under_domain_placement_rows_stay_in_their_placement_group(jobs, job, groups):
    """Rows that are the number of the rank that sends them arrive from the own group's ranks alone."""
    ranks = results(jobs(job), "placed")
    for rank, tensors in enumerate(ranks):
        (group,) = [group for group in groups if rank in group]
        came = set(tensors["came_from"].tolist())
        assert rank in came and came <= group
        # Nor does it read text of another group's domains.
        assert set(tensors["read"].tolist()) <= ({0} if 0 in group else {1, 2})
    assert set().union(*(set(tensors["read"].tolist()) for tensors in ranks)) == {0, 1, 2}
