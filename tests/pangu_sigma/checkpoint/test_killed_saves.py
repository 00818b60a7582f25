"""kill -9 of a real process in the middle of its saves: the last complete checkpoint is found and is whole."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pangu_sigma.checkpoint import find_latest, remove_stale

SCRIPT = Path(__file__).with_name("saving_process.py")


def unfinished(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoints/.tmp-*") if not (path / "manifest.json").exists()]


def save_until_killed(run: Path, first: int, wait: float, *, inside: bool) -> int:
    """Starts saving, kills the process `wait` seconds after its first save: `inside` the next one, or anywhere.

    Returns the last step that it had finished for certain.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(SCRIPT), str(run), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == f"saved {first}\n"
        time.sleep(wait)
        deadline = time.monotonic() + 10
        while inside and not unfinished(run) and time.monotonic() < deadline:
            pass
        process.kill()
        lines = process.stdout.read().split("\n")
    return max([first] + [int(line.split()[1]) for line in lines if line.startswith("saved ")])


def kill_often(run: Path, times: int) -> None:
    draw = random.Random(0)
    first, caught = 1, 0
    for attempt in range(times):
        finished = save_until_killed(run, first, draw.uniform(0, 0.25), inside=attempt % 2 == 0)
        left = unfinished(run)
        caught += bool(left)
        checkpoint, messages = find_latest(run)
        # the kill may fall between the rename and the line that tells of it
        assert checkpoint.step in (finished, finished + 1) and checkpoint.state == {"step": checkpoint.step}
        assert all(any(str(path) in message for message in messages) for path in left)
        checkpoint.verify()
        for name, array in checkpoint.load().items():
            assert (array == (checkpoint.step if "law" not in name else checkpoint.step // 2)).all()
        first = checkpoint.step + 1
    assert caught >= times / 4, f"only {caught} of {times} kills fell into a save"
    remove_stale(run)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(list((run / "checkpoints").iterdir())) <= 3  # keep=2, and one that the kill kept from being pruned


def test_the_last_checkpoint_is_whole_after_every_kill(tmp_path):
    kill_often(tmp_path, 8)


@pytest.mark.slow
def test_the_last_checkpoint_is_whole_after_many_kills(tmp_path):
    kill_often(tmp_path, 60)
