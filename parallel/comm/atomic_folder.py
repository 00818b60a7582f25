"""Atomic folder: written under a hidden name, locked, and renamed when it is complete; a failure leaves nothing behind.

A process that is killed on the way leaves a hidden folder, which nobody takes for the finished one and which the next
writer of the same folder removes. The lock is flock's: the system drops it when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# Between making a folder and locking it, its owner is told from a dead process of the same number by the folder's age.
_MAX_SECONDS_BEFORE_LOCK = 60.0


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_synced(folder: Path, final: Path) -> None:
    """Give `folder` its final name, which nothing has but an empty folder."""
    os.rename(folder, final)
    sync_folder(final.parent)


def rename_unless_there(folder: Path, final: Path) -> None:
    """As `rename_synced`; what another process put under that name meanwhile stays, as good as this."""
    try:
        os.rename(folder, final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(folder)
    else:
        sync_folder(final.parent)


@contextmanager
def atomic_folder(
    final: Path, publish: Callable[[Path, Path], None] = rename_synced, shared: bool = False
) -> Iterator[Path]:
    """Write the folder `final`: the block fills a hidden folder beside it, to which `publish` gives the name.

    shared: processes of several machines may write `final` at once; neither a lock nor a process's number tells of
    another machine's, so the hidden name has the machine's.

    Parents are made, what killed writers of `final` left is removed. Whatever ends the block early, Ctrl-C too, removes
    the hidden folder, and the parents that it made. Raises OSError.
    """
    made = make_parents(final)
    try:
        with _hidden_folder(final, shared) as hidden:
            yield hidden
            publish(hidden, final)
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def _hidden_folder(final: Path, shared: bool) -> Iterator[Path]:
    """The locked folder beside `final` that is filled; removed where the block fails."""
    prefix = f".tmp-{final.name}-{os.uname().nodename}-" if shared else f".tmp-{final.name}-"
    _remove_abandoned(final.parent, prefix)
    if not shared:
        _remove_abandoned(final.parent, f".{final.name}.unfinished-")  # so versions before 0.2.0 called theirs
    hidden = final.with_name(f"{prefix}{os.getpid()}")
    hidden.mkdir()
    with lock_working_folder(hidden):
        try:
            yield hidden
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def make_parents(path: Path) -> list[Path]:
    """Make the folders above `path` that are not there; returns them, the innermost first. Raises OSError and leaves
    none then."""
    missing = []
    for parent in path.parents:
        if parent.is_dir():
            break
        missing.append(parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(missing)
        raise
    return missing


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove these folders, the innermost first, as far as nothing is in them."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """What cannot be removed stays: another process may be removing it just now, or it is another user's."""
    for path in folder.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix)
        if pid.isdecimal() and path.is_dir() and is_abandoned(path, int(pid)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def lock_working_folder(folder: Path) -> Iterator[None]:
    """Lock on an existing folder that is being written, replaced or deleted (it may be renamed meanwhile).

    While it lasts, `is_abandoned` is false in every process.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # A file system without locks refuses: the process number in the folder's name is what remains.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_abandoned(folder: Path, pid: int) -> bool:
    """Whether no process works any more on `folder`, which process `pid` made and locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        locks = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            locks = False
        if pid == os.getpid() or not process_exists(pid):
            return True
        return locks and time.time() - os.fstat(handle).st_mtime > _MAX_SECONDS_BEFORE_LOCK
    finally:
        os.close(handle)


def process_exists(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        with suppress(PermissionError):
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
