"""`train --workers N`: real processes, started, interrupted, killed and hung; any number of them goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.checkpoint.folder_locks import lock_run_folder
from pangu_sigma.errors import INTERRUPTED, STOPPED
from pangu_sigma.signals import exit_code, signal_name
from parallel.comm.launch import free_port
from tests.pangu_sigma.training.training_process import (
    ROOT,
    UNSEEN,
    assert_refused,
    checkpoint,
    command,
    started,
    steps_logged,
    wait_until,
)

# Two rows at a time are cut over two processes; nobody evaluates, which costs graphs.
LEAN = ["evaluate.every=0", "checkpoint.every=0"]
SMALL_GRAPH = ["model.layers=1", "model.query_layer=none", "model.dropout=0", "model.attention.dropout=0"]
TIMEOUT = 60  # seconds; nobody meets anybody while graphs are compiled


def assert_same_training(first: Path, second: Path) -> None:
    """Equal state but for hashes of a previous model; tensors equal but for rounding, whole numbers exactly."""
    states = [json.loads((folder / "state.json").read_text()) for folder in (first, second)]
    for state in states:
        for name in ("model", "fisher"):
            state.get("previous", {}).pop(name, None)
    assert states[0] == states[1]
    for path in sorted(first.rglob("*.safetensors")):
        tensors, other = load_file(path), load_file(second / path.relative_to(first))
        assert tensors.keys() == other.keys()
        for name, tensor in tensors.items():
            if name.endswith(UNSEEN):
                continue
            if tensor.dtype.kind == "f":
                np.testing.assert_allclose(other[name], tensor, atol=2e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(other[name], tensor, err_msg=name)


def children(pid: int) -> list[int]:
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += [int(word) for word in (task / "children").read_text().split()]
    return pids


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def rank_of(pid: int) -> str | None:
    values = dict(part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part)
    return values.get("MS_NODE_ID")


def test_two_processes_stop_when_asked_and_save_together(small_yaml, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    words = ["train", small_yaml, f"run.dir={run}", *LEAN, *SMALL_GRAPH, "train.steps=5000", "--workers", 2]
    process = started(*words, cwd=tmp_path, log=log)
    assert wait_until(lambda: steps_logged(run) >= 3, process), log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == STOPPED, log.read_text()
    assert "SIGTERM: saved step" in log.read_text() and "continue with --resume" in log.read_text()
    assert "Traceback" not in log.read_text() + (run / "workers" / "rank-1.log").read_text()
    (saved,) = (run / "checkpoints").iterdir()
    open_checkpoint(saved).verify()


def test_a_mesh_that_does_not_fit_is_refused_before_anything_starts(small_yaml, tmp_path):
    begin = time.monotonic()
    arguments = ["train", small_yaml, f"run.dir={tmp_path / 'run'}"]
    assert_refused(command(*arguments, "--workers", 3, cwd=tmp_path), "--workers 3", "train.batch_size")
    assert_refused(command(*arguments, "parallel.data=2", cwd=tmp_path), "parallel.workers=2", "msrun")
    assert_refused(command(*arguments, "parallel.data=2", "--workers", 4, cwd=tmp_path), "parallel.workers = 4")
    assert time.monotonic() - begin < 60 and not (tmp_path / "run" / "workers").exists()


def test_a_folder_that_is_taken_or_cannot_be_written_is_refused_before_anything_starts(small_yaml, tmp_path):
    run = tmp_path / "run"
    with lock_run_folder(run / "workers"):
        done = command("train", small_yaml, f"run.dir={run}", "--workers", 2, cwd=tmp_path)
        assert_refused(done, "another job of several processes works in", str(run))
    assert [path.name for path in (run / "workers").iterdir()] == [".lock"]
    done = command("train", small_yaml, "run.dir=/proc/run", "--workers", 2, cwd=tmp_path)
    assert_refused(done, "run.dir /proc/run/workers cannot be written")


@pytest.fixture
def training(request, small_yaml, tmp_path):
    """A long run of two processes under way: (launcher, rank -> process number, run, log); its parameter is how long
    they wait for each other."""
    timeout = f"parallel.timeout={getattr(request, 'param', 600)}"
    run, log = tmp_path / "run", tmp_path / "log.txt"
    long = ["train.steps=5000", "checkpoint.every=3", "evaluate.every=0", timeout, *SMALL_GRAPH]
    process = started("train", small_yaml, f"run.dir={run}", *long, "--workers", 2, cwd=tmp_path, log=log)
    assert wait_until(lambda: steps_logged(run) >= 5, process), log.read_text()
    of_rank = {rank_of(pid): pid for pid in children(process.pid)}
    yield process, of_rank, run, log
    for pid in of_rank.values():
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def assert_all_ended(process, of_rank, begin: float, code: int) -> None:
    assert process.wait(timeout=40) == code
    assert time.monotonic() - begin < 30
    time.sleep(0.2)
    assert not [pid for pid in of_rank.values() if alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_ends_the_job_by_name_and_the_run_goes_on(training, small_yaml, tmp_path, rank):
    process, of_rank, run, log = training
    begin = time.monotonic()
    os.kill(of_rank[rank], signal.SIGKILL)
    assert_all_ended(process, of_rank, begin, 2)
    assert log.read_text().splitlines()[-1].startswith(f"Error: rank {rank} of 2 was killed by SIGKILL")
    saved = max(path.name for path in (run / "checkpoints").glob("step-*"))
    stop = f"train.stop_at={int(saved.removeprefix('step-')) + 2}"
    words = ["train", small_yaml, f"run.dir={run}", "train.steps=5000", "evaluate.every=0", *SMALL_GRAPH, stop]
    done = command(*words, "--workers", 2, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and f"resumed from {saved}" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("training", [TIMEOUT], indirect=True)
def test_a_process_that_hangs_ends_the_job_after_the_time_that_the_configuration_gives(training):
    process, of_rank, _, log = training
    begin = time.monotonic()
    os.kill(of_rank["1"], signal.SIGSTOP)
    assert process.wait(timeout=TIMEOUT + 30) == 2
    assert time.monotonic() - begin > TIMEOUT - 5
    assert f"rank 0 waited {TIMEOUT} s (parallel.timeout) for rank 1" in log.read_text()
    assert not [pid for pid in of_rank.values() if alive(pid)]


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process(training):
    process, of_rank, _, _ = training
    process.kill()
    process.wait()
    time.sleep(1)
    assert not [pid for pid in of_rank.values() if alive(pid)]


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(training):
    process, of_rank, _, _ = training
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # one that is not yet delivered swallows another
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == INTERRUPTED and time.monotonic() - begin < 10
    assert not [pid for pid in of_rank.values() if alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [("0", signal.SIGUSR1), ("1", signal.SIGHUP), ("1", signal.SIGINT)])
def test_a_signal_to_one_process_stops_all_of_them_and_names_it(training, rank, number):
    process, of_rank, run, log = training
    os.kill(of_rank[rank], number)
    assert process.wait(timeout=120) == exit_code(number), log.read_text()
    assert f"{signal_name(number)}: saved step" in log.read_text()
    assert not [pid for pid in of_rank.values() if alive(pid)]
    open_checkpoint(max((run / "checkpoints").glob("step-*"))).verify()


def under_msrun(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`pangu-sigma ARGUMENTS` in two processes that msrun starts; their logs lie in `cwd`/logs."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [shutil.which("msrun", path=path), "--worker_num=2", "--local_worker_num=2", "--join=True"]
    words += [f"--master_port={free_port()}", f"--log_dir={cwd / 'logs'}", "python", "-m", "pangu_sigma"]
    return subprocess.run(
        [*words, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
    )  # fmt: skip


@pytest.mark.slow
def test_msrun_starts_the_same_run_on_the_mesh_that_workers_makes(small_yaml, finished_run, tmp_path):
    run = tmp_path / "run"
    done = under_msrun("train", small_yaml, f"run.dir={run}", *LEAN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_training(checkpoint(finished_run, 12), checkpoint(run, 12))
    parallel = yaml.safe_load((run / "config.yaml").read_text())["parallel"]
    assert (parallel["data"], parallel["expert"]) == (2, 1)  # five experts do not divide
    measured = under_msrun("evaluate", run, "--batches", 1, cwd=tmp_path)
    assert measured.returncode == 0 and (run / "evaluation.json").is_file(), measured.stderr


@pytest.mark.slow
def test_what_is_refused_under_msrun_ends_all_processes_in_seconds_with_the_sentence(
    small_yaml, finished_run, tmp_path
):
    whole = "train.gradient_accumulation_steps=1"
    refusals = {
        "do not divide: choose a batch": ["train", small_yaml, "run.dir=batch", "train.batch_size=3", whole],
        "parallel makes a mesh of 4": ["train", small_yaml, "run.dir=mesh", "parallel.data=4", whole],
        "already holds a run": ["train", small_yaml, f"run.dir={finished_run}"],  # rank 0 alone finds that out
        "generate runs in one process, and 2 were started": ["generate", finished_run, "--prompt", "x"],
    }
    for sentence, arguments in refusals.items():
        begin = time.monotonic()
        done = under_msrun(*arguments, cwd=tmp_path)
        logs = "".join(path.read_text() for path in sorted((tmp_path / "logs").glob("worker_*.log")))
        assert done.returncode == 1 and time.monotonic() - begin < 120, done.stdout
        assert "Traceback" not in logs and any(
            line.startswith("Error: ") and sentence in line
            for line in logs.splitlines()
        ), logs


@pytest.fixture(scope="module")
def six_experts(small_yaml, tmp_path_factory) -> Callable[..., Path]:
    """Run or go on with a training of two, two and two experts to a step, by so many processes; returns the run."""
    folder = tmp_path_factory.mktemp("six")

    def go(name: str, step: int, workers: int, *more: str) -> str:
        words = ["train", small_yaml, f"run.dir={folder / name}", *LEAN, "domains.law.experts=2", "train.batch_size=8"]
        done = command(*words, f"train.stop_at={step}", "--workers", workers, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stderr

    go.folder = folder
    return go


@pytest.mark.slow
def test_a_run_goes_on_under_other_meshes_with_the_same_text_and_they_measure_the_same(six_experts):
    six_experts("alone", 12, 1)
    six_experts("moved", 4, 2)
    stderr = six_experts("moved", 8, 4, "--resume")
    assert "no longer bit-equal to the run without a break: parallel.data was 1 and is 2" in " ".join(stderr.split())
    stderr = six_experts("moved", 12, 1, "--resume")
    assert "break: parallel.data was 2 and is 1; parallel.expert was 2 and is 1" in " ".join(stderr.split())
    moved = six_experts.folder / "moved"
    assert_same_training(checkpoint(six_experts.folder / "alone", 12), checkpoint(moved, 12))
    evaluations = {}
    for workers in (1, 2, 4):
        done = command("evaluate", moved, "--json", "--batches", 2, "--workers", workers, cwd=moved)
        assert done.returncode == 0, done.stderr
        evaluations[workers] = json.loads(done.stdout)
        assert evaluations[workers]["tokens"] == evaluations[1]["tokens"] and len(evaluations[1]["matrix"]) == 3
        for text, by_group in evaluations[1]["matrix"].items():
            assert evaluations[workers]["matrix"][text] == pytest.approx(by_group, rel=1e-5)


@pytest.mark.slow
def test_a_phase_that_stays_near_the_previous_model_is_the_same_in_two_processes(small_yaml, tmp_path):
    near = "{output: 0.5, l2: 0.1, ewc: 5, fisher_batches: 2, through: old}"
    phases = f"[{{steps: 4, weights: {{code: 1}}}}, {{weights: {{law: 1}}, shared: regularised, regularise: {near}}}]"
    words = ["train", small_yaml, *LEAN, *SMALL_GRAPH, f"train.phases={phases}", "data.max_domains_per_batch=null"]
    for run, stop, workers in (("alone", 8, 1), ("two", 6, 2), ("two", 8, 1)):
        options = [f"run.dir={tmp_path / run}", f"train.stop_at={stop}", "--workers", workers]
        more = ["--resume"] if (tmp_path / run).exists() else []
        done = command(*words, *options, *more, cwd=tmp_path)
        assert done.returncode == 0 and "phase 1 stays near the model of step 4" in done.stderr, done.stderr
    assert_same_training(checkpoint(tmp_path / "alone", 8), checkpoint(tmp_path / "two", 8))
    figures = []
    for run in ("alone", "two"):
        records = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        figures.append([list(r["figures"].values()) for r in records if r["kind"] == "train" and r["step"] > 4])
    np.testing.assert_allclose(figures[1], figures[0], rtol=0.02, atol=1e-4)
    kept = [open_checkpoint(tmp_path / run / "previous" / "step-00000004") for run in ("alone", "two")]
    assert kept[0].names() == kept[1].names() == kept[0].names(optimizer=False)


@pytest.mark.slow
def test_under_domain_placement_each_half_of_the_processes_reads_its_own_domains(small_yaml, tmp_path):
    run = tmp_path / "run"
    mesh = ["parallel.expert=2", "parallel.placement=domain", "parallel.placement_groups=2"]
    words = ["train", small_yaml, f"run.dir={run}", *LEAN, "train.phases=[]", "train.stop_at=4", *mesh]
    words += ["domains.poems.experts=3", "data.max_domains_per_batch=1", "domains.poems.weight=2"]
    done = command(*words, "--workers", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            # Two sequences of 16 tokens of poems, and two of one of the two domains of the other group.
            assert list(record["tokens"].values()) == [32, 32] and "poems" in record["tokens"]
    # Any text is measured under any domain's experts, wherever they are.
    alone, together = (
        command("evaluate", run, "--json", "--batches", 1, "--workers", workers, cwd=tmp_path) for workers in (1, 2)
    )
    for text, by_group in json.loads(alone.stdout)["matrix"].items():
        assert json.loads(together.stdout)["matrix"][text] == pytest.approx(by_group, rel=1e-5)
    everywhere = ["parallel.placement=global", "parallel.placement_groups=1", "--workers", 2, "--resume"]
    assert_refused(command(*words, *everywhere, cwd=tmp_path), 'parallel.placement was "domain" and is "global"')


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes_with_one_sentence(small_yaml, tmp_path):
    run = tmp_path / "run"
    bad = ["optimizer.learning_rate=1e30", "schedule.warmup_steps=0", "train.nonfinite=rollback", "train.skip_budget=2"]
    words = ["train", small_yaml, f"run.dir={run}", "evaluate.every=0", "checkpoint.every=1", *SMALL_GRAPH, *bad]
    done = command(*words, "--workers", 2, cwd=tmp_path)
    assert_refused(done, "train.skip_budget=2 is used up")
    assert done.stderr.count("rolled back to step 1") == 2
    assert "Traceback" not in (run / "workers" / "rank-1.log").read_text()
