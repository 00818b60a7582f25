"""Atomic folder: written under a hidden name, locked, and renamed when it is complete; a failure leaves nothing behind.

A process that is killed on the way leaves a hidden folder, which nobody takes for the finished one and which the next
writer of the same folder removes.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pangu_sigma.checkpoint.folder_locks import is_abandoned, lock_working_folder


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
        rename_synced(folder, final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(folder)


@contextmanager
def atomic_folder(final: Path, publish: Callable[[Path, Path], None] = rename_synced) -> Iterator[Path]:
    """Write the folder `final`: the block fills a hidden folder beside it, to which `publish` gives the name.

    Parents are made, what killed writers of `final` left is removed. Whatever ends the block early, Ctrl-C too, removes
    the hidden folder. Raises OSError.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    hidden = final.with_name(f"{_hidden_prefix(final)}{os.getpid()}")
    hidden.mkdir()
    with lock_working_folder(hidden):
        try:
            yield hidden
            publish(hidden, final)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def _remove_abandoned(final: Path) -> None:
    prefix = _hidden_prefix(final)
    for path in final.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix)
        if pid.isdecimal() and path.is_dir() and is_abandoned(path, int(pid)):
            shutil.rmtree(path)


def _hidden_prefix(final: Path) -> str:
    return f".tmp-{final.name}-"
