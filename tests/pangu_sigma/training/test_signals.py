"""Ctrl-C and SIGTERM: the run saves where it stands and ends well; before the first step it just ends."""

import random
import re
import signal
import time

import pytest

from tests.pangu_sigma.training.training_process import (
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
        assert process.wait(120) == 0
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
        assert process.wait(180) == 0, log.read_text()
    finally:
        process.kill()
    assert "Ctrl-C: saved step 1; continue with --resume" in log.read_text()
    assert checkpoint(run, 1).is_dir()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_preparing_ends_the_program(small_yaml, tmp_path, signal_number):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = started("train", small_yaml, f"run.dir={run}", cwd=tmp_path, log=log)
    try:
        assert wait_until((run / ".lock").exists, process)
        process.send_signal(signal_number)
        assert process.wait(60) == 130, log.read_text()
    finally:
        process.kill()
    assert log.read_text().endswith("Interrupted.\n")


@pytest.mark.slow
def test_ctrl_c_is_heard_at_any_moment(small_yaml, tmp_path):
    """From the lock to the last step: it saved and says so, or there was nothing to save and it says that. Half of the
    signals come while it prepares, or soon after; the others while it trains."""
    draw = random.Random(0)
    codes = []
    for index in range(20):
        run, log = tmp_path / f"run-{index}", tmp_path / f"log-{index}.txt"
        arguments = ["train", small_yaml, f"run.dir={run}", "data.cache=null", "train.steps=200"]
        process = started(*arguments, "evaluate.every=0", cwd=tmp_path, log=log)
        try:
            begun = (run / ".lock").exists if index % 2 else lambda run=run: steps_logged(run) >= 1
            assert wait_until(begun, process)
            time.sleep(draw.uniform(0.0, 6.0 if index % 2 else 1.0))
            process.send_signal(draw.choice([signal.SIGINT, signal.SIGTERM]))
            codes.append(process.wait(180))
        finally:
            process.kill()
        stderr = log.read_text()
        saved = re.search(r"(?:Ctrl-C|SIGTERM): saved step (\d+); continue with --resume\n$", stderr)
        assert "Traceback" not in stderr
        if codes[-1] == 0:
            assert checkpoint(run, int(saved[1]) if saved else 200).is_dir(), stderr
        else:
            assert codes[-1] == 130 and stderr.endswith("Interrupted.\n"), (codes[-1], stderr)
    assert {0, 130} <= set(codes)
