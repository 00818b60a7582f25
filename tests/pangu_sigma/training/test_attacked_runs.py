"""Runs under attack: single bits flipped in every file, and a resume that is killed or fails at its file operations."""

from __future__ import annotations

import errno
import random
import shutil
from pathlib import Path

import pytest

from pangu_sigma.checkpoint import find_latest
from pangu_sigma.config import load_config
from pangu_sigma.errors import UserError
from pangu_sigma.training.job import open_run
from pangu_sigma.training.task import TrainingTask
from tests import file_faults
from tests.pangu_sigma.training import training_process
from tests.pangu_sigma.training.training_process import assert_equal_checkpoints, checkpoint

# What no resume reads, beside checkpoints that are not the last: figures for people, and a user's own configuration.
HARMLESS = ("metrics.jsonl", "summary.json", "evaluation.json", "config.yaml", ".lock", "tensorboard/", "mindspore/",
            "workers/")


class Accepted(Exception):
    """The run would go on: all that is left is to load the framework."""


def resume(run: Path, file: Path) -> None:
    """All of a resume that comes before the framework is loaded. Raises Accepted at its end, UserError."""

    def accept(start) -> TrainingTask:
        TrainingTask(start)
        raise Accepted

    overrides = [f"run.dir={run}", f"data.cache={run / 'data'}"]
    with open_run(load_config(file, overrides), resume=True, make_task=accept):
        pass


@pytest.mark.parametrize("flips", [0, pytest.param(12, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_a_runs_file_is_refused_by_name_or_harmless(small_yaml, copied_run, flips):
    run, draw = copied_run(4), random.Random(1)
    # Text that others have tokenised into the shared run, of other settings, is not read: only what a resume needs.
    shutil.rmtree(run / "data")
    with pytest.raises(Accepted):
        resume(run, small_yaml)
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files if flips else draw.sample(files, 10):
        name, content = str(path.relative_to(run)), path.read_bytes()
        for bit in draw.sample(range(8 * len(content)), min(flips or 1, 8 * len(content))):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            own = run / "config.yaml" if name == "config.yaml" else small_yaml
            try:
                resume(run, own)
            except Accepted:
                is_older = name.startswith("checkpoints/") and "step-00000004" not in name
                assert name.startswith(HARMLESS) or is_older, f"{name}: bit {bit} was not noticed"
            except UserError as error:
                assert str(path) in str(error) or name == "config.yaml", f"{name}: bit {bit}: {error}"
            path.write_bytes(content)
    with pytest.raises(Accepted):
        resume(run, small_yaml)


@pytest.mark.slow
@pytest.mark.parametrize("number", [file_faults.KILL, errno.EIO])
def test_a_resume_attacked_at_its_file_operations_goes_on_to_the_same_bytes(
    small_yaml, finished_run, copied_run, monkeypatch, number
):
    """Of a whole process: its lock, its text, its saves, its metrics."""
    before, folder = copied_run(4), finished_run.parent
    run = before.with_name("attacked")
    arguments = ["train", small_yaml, f"run.dir={run}", "train.stop_at=6", "evaluate.every=0", "--resume"]
    ended = set()
    for operation in (0, 5, 20, 45, 80, 130):
        shutil.copytree(before, run)
        environment = file_faults.armed_environment(run, operation, number)
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            done = training_process.command(*arguments, cwd=folder)
        ended.add(done.returncode)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in ((0, -9) if number == file_faults.KILL else (0, 2)), done.stderr
        if done.returncode == 2:
            assert done.stderr.splitlines()[-1].startswith("Error: ")
        latest, _ = find_latest(run)
        assert latest.step in (4, 6)
        latest.verify()
        again = training_process.command(*arguments, cwd=folder)
        assert again.returncode == 0, again.stderr
        assert_equal_checkpoints(checkpoint(finished_run, 6), checkpoint(run, 6))
        shutil.rmtree(run)
    assert ended - {0}, "no operation was hit"
