"""A disk that is full, or becomes full, or refuses: a sentence, nothing left behind, the last checkpoint whole."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pangu_sigma.checkpoint import CheckpointError, find_latest

MIB = 1 << 20


def model(mib: int, fill: float) -> dict[str, np.ndarray]:
    return {f"blocks.{i}.feed_forward.up.weight": np.full(MIB // 4, fill, np.float32) for i in range(mib)}


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def assert_only_step_1(run: Path) -> None:
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    checkpoint, messages = find_latest(run)
    assert checkpoint.step == 1 and messages == []
    checkpoint.verify()


def test_too_little_space_is_told_before_writing(small_disk, save):
    run = small_disk / "run"
    save(run, 1, model(6, 1.0), groups={})
    started = []
    with pytest.raises(CheckpointError, match=r"step 2 was not saved: it needs 12\.\d MiB, and \d+\.\d MiB are free"):
        save(run, 2, model(12, 2.0), groups={}, progress=lambda done, total: started.append(done))
    assert not started
    assert_only_step_1(run)


def test_only_files_that_must_be_written_count(small_disk, save):
    run = small_disk / "run"
    save(run, 1, model(12, 1.0), groups={})
    result = save(run, 2, model(12, 1.0), groups={})
    assert result.bytes_linked > 12 * MIB


def test_a_disk_that_fills_up_meanwhile_ends_the_save(small_disk, save):
    run = small_disk / "run"
    save(run, 1, model(4, 1.0), groups={})

    def fill(done: int, total: int) -> None:
        """Another program takes the space while the save is under way."""
        if done > 2 * MIB and not (small_disk / "other").exists():
            with open(small_disk / "other", "wb", buffering=0) as other:
                while other.write(bytes(MIB)) == MIB:
                    pass

    with pytest.raises(CheckpointError, match=r"step 2 was .*No space left on device \(it needs 8\.\d MiB"):
        save(run, 2, model(8, 2.0), groups={}, progress=fill)
    assert_only_step_1(run)
    (small_disk / "other").unlink()
    assert save(run, 2, model(8, 2.0), groups={}).messages == ()


def test_a_limit_on_file_sizes_ends_the_save(tmp_path, save):
    """The same without root: the system ends a write in the middle of a file."""
    save(tmp_path, 1, model(2, 1.0), groups={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large .*ulimit -f.*the last checkpoint is whole"):
            save(tmp_path, 2, model(8, 2.0), groups={})
        assert save(tmp_path, 3, model(2, 3.0), groups={}, keep=5).path.name == "step-00000003"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert save(tmp_path, 2, model(8, 2.0), groups={}, keep=5).path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path, save):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=r"run.*Permission denied.*make the folder writable"):
        save(tmp_path / "run", 1, model(1, 1.0), groups={})


def test_a_file_in_the_folders_place_is_named(tmp_path, save):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints: File exists"):
        save(tmp_path, 1, model(1, 1.0), groups={})


def test_the_package_does_not_need_mindspore():
    code = "import sys, pangu_sigma.checkpoint; print('mindspore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout == "False\n"
