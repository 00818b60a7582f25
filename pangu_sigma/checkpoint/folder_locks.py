"""Locks on folders: one job in a run's folder at a time, and hidden folders of living processes told from left ones.

Both are flock locks, which the system drops when the process that holds them ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pangu_sigma.errors import UserError

# Between making a folder and locking it, its owner is told from a dead process of the same number by the folder's age.
_MAX_SECONDS_BEFORE_LOCK = 60.0


def lock_run_folder(folder: Path, taken: str = "another process is training in") -> TextIO:
    """Lock a run's folder, made if needed, against a second job; close the result to let it go.

    Raises UserError if the folder cannot be written or is locked already; its sentence then begins with `taken`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - open for the length of the run
    except OSError as error:
        raise UserError(f"run.dir {folder} cannot be written ({error.strerror}): choose another folder") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise UserError(f"{taken} {folder}: wait for it or set another run.dir") from error
    return stream


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
        if pid == os.getpid() or not _exists(pid):
            return True
        return locks and time.time() - os.fstat(handle).st_mtime > _MAX_SECONDS_BEFORE_LOCK
    finally:
        os.close(handle)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
