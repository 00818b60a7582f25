"""`train --workers N`: real processes, started, interrupted, killed and hung; any number of them goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parallel.launch import free_port
from tests.pangu_sigma.train.process import (
    ROOT,
    assert_refused,
    checkpoint,
    command,
    started,
    steps_logged,
    wait_until,
)

# Two rows at a time are cut over two processes; nobody evaluates, which costs graphs.
LEAN = ["evaluate.every=0", "checkpoint.every=0"]


def assert_same_training(first: Path, second: Path) -> None:
    """Equal state; tensors equal but for rounding, whole numbers exactly."""
    assert json.loads((first / "state.json").read_text()) == json.loads((second / "state.json").read_text())
    for path in sorted(first.rglob("*.safetensors")):
        mine, other = load_file(path), load_file(second / path.relative_to(first))
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            if tensor.dtype.kind == "f":
                np.testing.assert_allclose(other[name], tensor, atol=2e-4, err_msg=name)
            else:
                np.testing.assert_array_equal(other[name], tensor, err_msg=name)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def rank_of(pid: int) -> str | None:
    values = dict(part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part)
    return values.get("MS_NODE_ID")


def test_two_processes_stop_when_asked_and_one_goes_on_with_the_same_text(small_yaml, finished_run, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = started("train", small_yaml, f"run.dir={run}", *LEAN, "--workers", 2, cwd=tmp_path, log=log)
    assert wait_until(lambda: steps_logged(run) >= 5, process), log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0, log.read_text()
    assert "SIGTERM: saved step" in log.read_text()
    assert "Traceback" not in log.read_text() + (run / "workers" / "rank-1.log").read_text()
    done = command("train", small_yaml, f"run.dir={run}", *LEAN, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint is of 2 processes (data 2 x expert 1), this run of 1" in done.stderr
    assert_same_training(checkpoint(finished_run, 12), checkpoint(run, 12))


def test_a_mesh_that_does_not_fit_is_refused_before_anything_starts(small_yaml, tmp_path):
    begin = time.monotonic()
    arguments = ["train", small_yaml, f"run.dir={tmp_path / 'run'}"]
    assert_refused(command(*arguments, "--workers", 3, cwd=tmp_path), "--workers 3", "train.batch_size")
    assert_refused(command(*arguments, "parallel.data=2", cwd=tmp_path), "--workers 2", "msrun")
    assert_refused(command(*arguments, "parallel.data=2", "--workers", 4, cwd=tmp_path), "parallel.workers = 4")
    assert time.monotonic() - begin < 60 and not (tmp_path / "run" / "workers").exists()


@pytest.fixture
def training(small_yaml, tmp_path):
    """A long run of two processes under way: (launcher, rank -> process number, run, log)."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    long = ["train.steps=5000", "checkpoint.every=3", "evaluate.every=0", "parallel.timeout=20"]
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
    words = ["train", small_yaml, f"run.dir={run}", "train.steps=5000", "evaluate.every=0", stop, "--resume"]
    done = command(*words, "--workers", 2, cwd=tmp_path)
    assert done.returncode == 0 and f"resumed from {saved}" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_job_after_the_time_that_the_configuration_gives(training):
    process, of_rank, _, log = training
    begin = time.monotonic()
    os.kill(of_rank["1"], signal.SIGSTOP)
    assert process.wait(timeout=60) == 2
    assert 15 < time.monotonic() - begin < 50
    assert "rank 0 waited 20 s (parallel.timeout) for rank 1" in log.read_text()
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
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0 or time.monotonic() - begin < 30
    assert not [pid for pid in of_rank.values() if alive(pid)]


@pytest.mark.slow
def test_msrun_starts_the_same_run(small_yaml, finished_run, tmp_path):
    msrun = shutil.which("msrun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    run, port = tmp_path / "run", free_port()
    words = [msrun, "--worker_num=2", "--local_worker_num=2", f"--master_port={port}", f"--log_dir={tmp_path / 'logs'}"]
    train = ["-m", "pangu_sigma", "train", str(small_yaml), f"run.dir={run}", "parallel.data=2", *LEAN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*words, "--join=True", "python", *train], capture_output=True, text=True, cwd=tmp_path, env=environment,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_training(checkpoint(finished_run, 12), checkpoint(run, 12))


@pytest.mark.slow
def test_several_processes_measure_what_one_does(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    alone = json.loads(command("evaluate", run, "--json", "--batches", 2, cwd=tmp_path).stdout)
    done = command("evaluate", run, "--json", "--batches", 2, "--workers", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["tokens"] == alone["tokens"]
    for text, by_group in alone["matrix"].items():
        for group, loss in by_group.items():
            assert together["matrix"][text][group] == pytest.approx(loss, rel=1e-5)
