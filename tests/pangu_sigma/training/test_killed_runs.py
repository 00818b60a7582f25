"""kill -9 of real training processes, inside their saves too: a resume goes on from the last complete checkpoint."""

import random
import time

import pytest

from pangu_sigma.checkpoint import CheckpointError, find_latest
from tests.pangu_sigma.training.training_process import (
    assert_equal_checkpoints,
    checkpoint,
    command,
    started,
    unfinished_saves,
    wait_until,
)


def last_step(run) -> int:
    while True:
        try:
            latest, _ = find_latest(run)
        except CheckpointError:
            continue  # the run that goes on has put it out of the way meanwhile: there is a later one
        return 0 if latest is None else latest.step


def assert_said_from_where(stderr: str, step: int) -> None:
    if step:
        assert f"resumed from step-{step:08d} (step {step})" in stderr
    else:
        assert "no complete checkpoint to resume from: beginning at step 0" in stderr


def kill_once(arguments: list, run, log, draw: random.Random, moment: str) -> None:
    """Start the run and kill it: while it starts, between two steps, or while a save stands unfinished."""
    before = last_step(run)
    process = started(*arguments, cwd=run.parent, log=log)
    try:
        if moment == "starting":
            time.sleep(draw.uniform(0.2, 4.0))
            return
        # Some steps on, so that the run gets ahead between two kills.
        expected = before + draw.randrange(4)
        if moment == "saving":
            caught = wait_until(lambda: bool(unfinished_saves(run)) and last_step(run) >= expected, process)
        else:
            caught = wait_until(lambda: last_step(run) > expected, process)
            time.sleep(draw.uniform(0.0, 0.05))
        assert caught, log.read_text()
    finally:
        process.kill()
        process.wait()


def kill_often(small_yaml, folder, uninterrupted, steps: int, moments: list[str], changes: list[str]) -> None:
    """Kill the run at each of `moments`, resume to the end and compare with the uninterrupted run."""
    draw = random.Random(len(moments))
    run = folder / "run"
    arguments = ["train", small_yaml, f"run.dir={run}", "evaluate.every=0", "checkpoint.every=1", *changes, "--resume"]
    caught = 0
    for index, moment in enumerate(moments):
        before = last_step(run)
        log = folder / f"log-{index}.txt"
        kill_once(arguments, run, log, draw, moment)
        left = unfinished_saves(run)
        caught += bool(left)
        stderr = log.read_text()
        assert "Traceback" not in stderr and "Error" not in stderr
        if moment != "starting":
            assert_said_from_where(stderr, before)
    assert caught >= len(moments) / 4, f"only {caught} of {len(moments)} kills fell into a save"

    before = last_step(run)
    assert before < steps
    done = command(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_said_from_where(done.stderr, before)
    if left:
        assert f"removed {left[0]}, left by process" in done.stderr
    assert_equal_checkpoints(checkpoint(uninterrupted, steps), checkpoint(run, steps))


def test_a_run_killed_three_times_ends_with_the_same_bytes(small_yaml, tmp_path, finished_run):
    kill_often(small_yaml, tmp_path, finished_run, 12, ["saving", "stepping", "saving"], [])


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bytes(small_yaml, tmp_path):
    steps, moments = 120, ["saving", "stepping", "starting", "saving", "stepping"] * 4
    longer = [f"train.steps={steps}", "checkpoint.keep=2"]
    done = command("train", small_yaml, f"run.dir={tmp_path / 'whole'}", "evaluate.every=0", *longer, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kill_often(small_yaml, tmp_path, tmp_path / "whole", steps, moments, longer)
