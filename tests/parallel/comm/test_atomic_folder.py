"""A folder comes into being whole, whoever else writes it, or cleans up after a killed process, at the same time."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.comm import atomic_folder as module
from parallel.comm.atomic_folder import atomic_folder, rename_unless_there

WRITERS, ROUNDS = 4, 10


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_behind(final: Path, pid: int, host: str = os.uname().nodename) -> Path:
    """What a killed process of a machine left of a folder that several machines may write."""
    hidden = final.with_name(f".tmp-{final.name}-{host}-{pid}")
    (hidden / "inner").mkdir(parents=True)
    (hidden / "inner" / "part").write_bytes(b"part")
    return hidden


def write(final: Path) -> None:
    with atomic_folder(final, rename_unless_there, shared=True) as folder:
        (folder / "whole").write_bytes(b"whole")


def _write_all(finals: list[Path], barrier) -> None:
    for final in finals:
        barrier.wait()
        write(final)


def test_many_writers_of_one_folder_clean_up_after_a_killed_one(tmp_path, dead_pid):
    finals = [tmp_path / f"store-{number}" for number in range(ROUNDS)]
    for final in finals:
        leave_behind(final, dead_pid)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(WRITERS)
    writers = [context.Process(target=_write_all, args=(finals, barrier)) for _ in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    assert sorted(tmp_path.iterdir()) == sorted(finals)
    assert all((final / "whole").read_bytes() == b"whole" for final in finals)


def test_a_folder_that_another_machine_writes_stays(tmp_path, dead_pid):
    elsewhere = leave_behind(tmp_path / "store", dead_pid, host="elsewhere")
    here = leave_behind(tmp_path / "store", dead_pid)
    write(tmp_path / "store")
    assert (elsewhere / "inner" / "part").exists() and not here.exists()


def test_what_a_killed_process_of_an_earlier_version_left_is_removed(tmp_path, dead_pid):
    left, living = (tmp_path / f".store.unfinished-{pid}" for pid in (dead_pid, os.getppid()))
    for folder in (left, living):
        folder.mkdir()
    with atomic_folder(tmp_path / "store"):
        pass
    assert not left.exists() and living.exists()


def test_what_cannot_be_removed_is_in_nobodys_way(tmp_path, dead_pid, monkeypatch):
    left = leave_behind(tmp_path / "store", dead_pid)
    real = os.unlink

    def refuse(path, *args, **options):
        if str(path).endswith("part"):
            raise PermissionError(errno.EPERM, "not yours", str(path))
        real(path, *args, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    write(tmp_path / "store")
    assert left.exists() and (tmp_path / "store" / "whole").exists()


def test_a_fault_after_the_rename_is_told_as_it_is(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(module, "sync_folder", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "store")


def test_a_failure_removes_the_parents_that_were_made_and_no_others(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "there/new/deep/model") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
