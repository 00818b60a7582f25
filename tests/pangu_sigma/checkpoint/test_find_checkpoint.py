"""From what a user names to the right checkpoint, with a word on everything passed over."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pangu_sigma.checkpoint import CheckpointError, find_latest, open_checkpoint, remove_stale, resolve
from pangu_sigma.errors import UserError
from parallel.comm.atomic_folder import lock_working_folder


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder: Path, name: str, *, manifest: bool = False) -> Path:
    """What a killed process leaves: a copy of a checkpoint under a working name."""
    left = folder.with_name(name)
    shutil.copytree(folder, left)
    if not manifest:
        (left / "manifest.json").unlink()
    return left


def test_a_run_or_one_of_its_checkpoints_can_be_named(tmp_path, make, save):
    save(tmp_path, 9, make(1))
    save(tmp_path, 10, make(2))
    assert resolve(tmp_path).step == 10 and resolve(str(tmp_path)).messages == ()
    assert resolve(tmp_path / "checkpoints" / "step-00000009").step == 9
    shutil.copytree(tmp_path / "checkpoints" / "step-00000009", tmp_path / "model")
    assert resolve(tmp_path / "model").step == 9


def test_what_is_neither_is_refused_with_a_sentence(tmp_path, folder):
    (tmp_path / "empty-run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    left = leave(folder, "step-00000008")
    for path, message in {
        tmp_path / "absent": "does not exist",
        folder / "config.yaml": "is not a folder",
        tmp_path / "empty-run": "has no checkpoint yet",
        tmp_path / "notes": "neither a run",
        tmp_path / "checkpoints": "neither a run",
        left: "not a finished checkpoint",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            resolve(path)
        assert str(path) in str(caught.value)
    assert find_latest(tmp_path / "absent") == (None, [])


def test_unfinished_folders_are_passed_over_and_said_so(tmp_path, folder, dead):
    left = leave(folder, f".tmp-step-00000008-{dead}")
    complete = leave(folder, f".tmp-step-00000009-{dead}", manifest=True)
    trash = leave(folder, f".trash-step-00000006-{dead}", manifest=True)
    bare = leave(folder, "step-00000011")
    checkpoint, messages = find_latest(tmp_path)
    assert checkpoint.path == folder and list(checkpoint.messages) == messages
    for path in (left, complete, trash, bare):
        assert sum(str(path) in message for message in messages) == 1
    removed = remove_stale(tmp_path)
    assert len(removed) == 3 and not any(path.exists() for path in (left, complete, trash))
    assert all(f"left by process {dead}" in message for message in removed)
    assert remove_stale(tmp_path) == []


def test_the_next_save_removes_what_a_dead_process_left(tmp_path, folder, dead, make, save):
    left = leave(folder, f".tmp-step-00000008-{dead}")
    own = leave(folder, f".tmp-step-00000008-{os.getpid()}")  # a container's processes often get the same numbers again
    messages = save(tmp_path, 8, make(3)).messages
    assert not left.exists() and not own.exists() and len(messages) == 2


def test_a_folder_that_a_living_process_works_on_stays(tmp_path, folder):
    left = leave(folder, f".tmp-step-00000008-{os.getppid()}")
    with lock_working_folder(left):
        assert remove_stale(tmp_path) == [f"{left} stays: process {os.getppid()} is at work on it"]
    os.utime(left)
    assert "stays" in remove_stale(tmp_path)[0]  # it may be about to lock it
    os.utime(left, (0, 0))
    assert "removed" in remove_stale(tmp_path)[0]  # another process got the dead one's number
    assert not left.exists()


def test_a_replacement_cut_short_gives_the_old_version_back(tmp_path, folder, dead):
    aside = folder.with_name(f".replaced-{folder.name}-{dead}")
    folder.rename(aside)
    checkpoint, messages = find_latest(tmp_path)
    assert checkpoint.path == aside and checkpoint.step == 7 and "replacing" in messages[0]
    checkpoint.load()
    assert "is back" in remove_stale(tmp_path)[0]
    assert find_latest(tmp_path)[0].path == folder
    shutil.copytree(folder, aside)  # cut short a moment later: the new version is in place, the old one goes
    assert "removed" in remove_stale(tmp_path)[0]
    assert not aside.exists() and open_checkpoint(folder).load()


def test_a_manifest_that_is_a_link_is_not_followed(tmp_path, folder):
    (folder / "manifest.json").rename(tmp_path / "m.json")
    (folder / "manifest.json").symlink_to(tmp_path / "m.json")
    with pytest.raises(CheckpointError, match="is a link"):
        resolve(tmp_path)
