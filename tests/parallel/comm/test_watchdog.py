"""Processes that watch each other: real ones, without MindSpore."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from parallel.comm.launch import free_port
from parallel.comm.processes import LaunchEnvironment, Processes
from parallel.comm.watchdog import LOST, TIMED_OUT, Watchdog

ROOT = Path(__file__).parents[3]
RANK = """
import sys, time
from pathlib import Path
from parallel.comm.watchdog import Watchdog
folder, rank, timeout = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
watch = Watchdog(folder, rank, 2, timeout)
while not (folder / f"rank-{1 - rank}.alive").exists():
    time.sleep(0.01)
time.sleep(0.3)
watch.start()
print("started", flush=True)
for line in sys.stdin:
    if line == "mark\\n":
        watch.mark()
    elif line == "leave\\n":
        watch.leave()
        sys.exit(0)
    else:
        watch.close()
        sys.exit(0)
time.sleep(60)
"""


@pytest.fixture
def ranks(tmp_path):
    """Two ranks that watch each other, by their timeouts in seconds."""
    running: list[subprocess.Popen] = []

    def start(*timeouts: float) -> list[subprocess.Popen]:
        for rank, timeout in enumerate(timeouts):
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK, str(tmp_path), str(rank), str(timeout)], cwd=ROOT, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        for process in running:
            assert process.stdout.readline() == "started\n"
        return running

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_rank_that_is_killed_is_missed_within_seconds(ranks):
    first, second = ranks(60, 60)
    begin = time.monotonic()
    second.send_signal(signal.SIGKILL)
    assert first.wait(timeout=10) == LOST and time.monotonic() - begin < 5
    assert first.stderr.read() == "rank 1 is gone: this process stops too\n"


def test_a_rank_that_is_done_is_not_missed(ranks):
    first, second = ranks(60, 60)
    print("done", file=second.stdin, flush=True)
    assert second.wait(timeout=10) == 0
    time.sleep(1.5)
    assert first.poll() is None
    print("done", file=first.stdin, flush=True)
    assert first.wait(timeout=10) == 0


def test_ranks_part_when_all_have_come_to_the_end(ranks):
    first, second = ranks(60, 60)
    print("leave", file=first.stdin, flush=True)
    time.sleep(1.5)
    assert first.poll() is None and second.poll() is None
    print("leave", file=second.stdin, flush=True)
    assert first.wait(timeout=10) == second.wait(timeout=10) == 0


def test_a_rank_that_is_killed_before_the_others_part_is_missed(ranks):
    first, second = ranks(60, 60)
    print("leave", file=first.stdin, flush=True)
    second.send_signal(signal.SIGKILL)
    assert first.wait(timeout=10) == LOST


def test_whoever_waits_too_long_says_for_whom(ranks):
    first, second = ranks(2, 60)
    print("mark", file=first.stdin, flush=True)
    assert first.wait(timeout=10) == TIMED_OUT
    assert first.stderr.read().startswith("Error: rank 0 waited 2 s (parallel.timeout) for rank 1: ")
    assert second.wait(timeout=10) == LOST


def test_a_rank_that_has_stopped_on_the_same_way_is_named(ranks):
    first, second = ranks(4, 60)
    second.send_signal(signal.SIGSTOP)
    assert first.wait(timeout=20) == TIMED_OUT
    assert first.stderr.read().startswith("Error: rank 0 waited 4 s (parallel.timeout) for rank 1: ")


def test_a_second_job_does_not_watch_in_the_same_folder(tmp_path):
    first = Watchdog(tmp_path, 0, 2, 60)
    with pytest.raises(BlockingIOError):
        Watchdog(tmp_path, 0, 2, 60)
    first.close()
    Watchdog(tmp_path, 0, 2, 60).close()


def test_the_environment_says_which_rank_this_is():
    assert LaunchEnvironment.read({}) is None and LaunchEnvironment.read({"MS_ROLE": "MS_SCHED"}) is None
    variables = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "1", "MS_WORKER_NUM": "2"}
    assert LaunchEnvironment.read(variables) == LaunchEnvironment(1, 2)
    by_rank_id = {"MS_ROLE": "MS_WORKER", "RANK_ID": "0", "MS_WORKER_NUM": "2"}
    assert LaunchEnvironment.read(by_rank_id) == LaunchEnvironment(0, 2)
    for wrong in ({"MS_NODE_ID": "2"}, {"MS_NODE_ID": "first"}, {"MS_WORKER_NUM": ""}):
        with pytest.raises(ValueError, match="MS_"):
            LaunchEnvironment.read({**variables, **wrong})


def test_a_process_that_is_alone_gets_back_what_it_gives():
    alone = Processes()
    assert alone.first and alone.texts("é") == ["é"] and not alone.any(False) and alone.any(True)
    np.testing.assert_array_equal(alone.gather(np.arange(3.0)), [[0, 1, 2]])
    np.testing.assert_array_equal(alone.total(np.arange(3)), [0, 1, 2])
    alone.leave()


def test_a_free_port_is_free():
    assert 1024 < free_port() < 65536
