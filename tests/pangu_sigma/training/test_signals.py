"""Signals that ask to stop: the run saves where it stands and says so; before the first step it just ends."""

import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from pangu_sigma.errors import INTERRUPTED, STOPPED
from pangu_sigma.signals import exit_code, interruption, interruption_message, signal_name
from parallel.comm.stop_signals import STOP_SIGNALS
from tests.pangu_sigma.training.training_process import (
    ROOT,
    assert_refused,
    checkpoint,
    command,
    started,
    steps_logged,
    wait_until,
)

LONG = 4000
PLAIN = ["model.dropout=0", "model.attention.dropout=0"]  # compiles faster


def test_sigterm_saves_and_the_run_resumes_from_there(small_yaml, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = ["train", small_yaml, f"train.steps={LONG}", "evaluate.every=0", "checkpoint.every=0", *PLAIN]
    process = started(*arguments, f"run.dir={run}", cwd=tmp_path, log=log)
    try:
        assert wait_until(lambda: steps_logged(run) >= 3, process)
        # While it trains, nobody else may write to its folder.
        second = command(*arguments, f"run.dir={run}", "--resume", cwd=tmp_path)
        assert_refused(second, f"another process is training in {run}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == STOPPED
    finally:
        process.kill()
    saved = steps_logged(run)
    assert f"SIGTERM: saved step {saved}; continue with --resume" in log.read_text()
    assert checkpoint(run, saved).is_dir() and saved < LONG
    resumed = command(*arguments, f"run.dir={run}", f"train.stop_at={saved + 1}", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0 and f"resumed from step-{saved:08d} (step {saved})" in resumed.stderr
    assert checkpoint(run, saved + 1).is_dir()


def test_ctrl_c_while_compiling_is_heard_after_the_first_step(small_yaml, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = started("train", small_yaml, f"run.dir={run}", "evaluate.every=0", cwd=tmp_path, log=log)
    try:
        # The summary is the last that is written before the first step is compiled, which takes seconds.
        assert wait_until((run / "summary.json").exists, process)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == INTERRUPTED, log.read_text()
    finally:
        process.kill()
    assert "Ctrl-C: saved step 1; continue with --resume" in log.read_text()
    assert checkpoint(run, 1).is_dir()


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [(signal.SIGINT, INTERRUPTED, "Interrupted."), (signal.SIGHUP, STOPPED, "Stopped by SIGHUP.")],
    ids=["Ctrl-C", "SIGHUP"],
)
def test_a_signal_while_preparing_ends_the_program(small_yaml, tmp_path, number, code, sentence):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = started("train", small_yaml, f"run.dir={run}", cwd=tmp_path, log=log)
    try:
        assert wait_until((run / ".lock").exists, process)
        process.send_signal(number)
        assert process.wait(60) == code, log.read_text()
    finally:
        process.kill()
    assert log.read_text().endswith(f"{sentence}\n")


@pytest.mark.slow
def test_a_signal_is_heard_at_any_moment_as_what_it_is(small_yaml, tmp_path):
    """From the lock to the last step: it saved and says so, or there was nothing to save and it says that. Half of the
    signals come while it prepares, or soon after; the others while it trains."""
    draw = random.Random(0)
    outcomes = set()
    for index in range(20):
        number = STOP_SIGNALS[index // 2 % len(STOP_SIGNALS)]
        run, log = tmp_path / f"run-{index}", tmp_path / f"log-{index}.txt"
        arguments = ["train", small_yaml, f"run.dir={run}", "data.cache=null", "train.steps=200"]
        process = started(*arguments, "evaluate.every=0", cwd=tmp_path, log=log)
        try:
            begun = (run / ".lock").exists if index % 2 else lambda run=run: steps_logged(run) >= 1
            assert wait_until(begun, process)
            time.sleep(draw.uniform(0.0, 6.0 if index % 2 else 1.0))
            process.send_signal(number)
            code = process.wait(180)
        finally:
            process.kill()
        stderr = log.read_text()
        assert "Traceback" not in stderr
        if code == 0:
            assert checkpoint(run, 200).is_dir(), stderr
            outcomes.add("finished")
            continue
        assert code == exit_code(number), (code, number, stderr)
        saved = re.search(r"^(\S+): saved step (\d+); continue with --resume$", stderr, re.MULTILINE)
        if saved:
            assert saved[1] == signal_name(number) and checkpoint(run, int(saved[2])).is_dir(), stderr
            outcomes.add("saved")
        else:
            assert stderr.endswith(f"{interruption_message(interruption(number))}\n"), stderr
            outcomes.add("nothing to save")
    assert {"saved", "nothing to save"} <= outcomes


@pytest.mark.slow
def test_a_closed_terminal_and_a_scheduler_that_insists_lose_nothing(small_yaml, tmp_path):
    """SIGHUP comes twice, from the shell and from the system; a scheduler sends its warning and then SIGTERM."""
    for name, numbers in {"terminal": [signal.SIGHUP] * 2, "Slurm": [signal.SIGUSR1, signal.SIGTERM]}.items():
        run, log = tmp_path / name, tmp_path / f"{name}.txt"
        arguments = ["train", small_yaml, f"train.steps={LONG}", "evaluate.every=0", "checkpoint.every=0", *PLAIN]
        process = started(*arguments, f"run.dir={run}", cwd=tmp_path, log=log)
        try:
            assert wait_until(lambda run=run: steps_logged(run) >= 2, process), log.read_text()
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.01)
            assert process.wait(120) == STOPPED, log.read_text()
        finally:
            process.kill()
        saved = steps_logged(run)
        assert f"{numbers[0].name}: saved step {saved};" in log.read_text() and checkpoint(run, saved).is_dir()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_nohup_keeps_sighup_away(small_yaml, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = ["train", small_yaml, f"train.steps={LONG}", "evaluate.every=0", "checkpoint.every=0", *PLAIN]
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = started(*arguments, f"run.dir={run}", cwd=tmp_path, log=log, preexec_fn=ignore)
    try:
        assert wait_until(lambda: steps_logged(run) >= 2, process), log.read_text()
        process.send_signal(signal.SIGHUP)
        steps = steps_logged(run)
        assert wait_until(lambda: steps_logged(run) >= steps + 3, process), log.read_text()
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == INTERRUPTED
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["reader gone", "closed", "full disk", "terminal gone"])
def test_no_closed_or_broken_stream_ends_a_training(small_yaml, tmp_path, streams):
    run = tmp_path / "run"
    words = ["train", str(small_yaml), f"run.dir={run}", "train.steps=4", "train.phases=[]", "schedule.warmup_steps=1"]
    words += ["evaluate.every=2", "checkpoint.every=2", "model.layers=1", "model.query_layer=none", *PLAIN]
    command_line = " ".join(map(shlex.quote, [sys.executable, "-m", "pangu_sigma", *words]))
    shells = {"closed": f"{command_line} <&- >&- 2>&-", "full disk": f"{command_line} >/dev/full 2>/dev/full"}
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    if streams == "terminal gone":
        leader, follower = pty.openpty()
        process = subprocess.Popen(command_line, shell=True, stdout=follower, stderr=follower, **options)
        os.close(follower)
        os.read(leader, 1)
        os.close(leader)
    elif streams == "reader gone":
        process = subprocess.Popen(
            command_line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        process.stdout.readline()
        process.stdout.close()
    else:
        process = subprocess.Popen(shells[streams], shell=True, **options)
    assert process.wait(300) == 0
    assert steps_logged(run) == 4 and checkpoint(run, 4).is_dir()
