"""Atomic folder: written under a hidden name, locked, and renamed when it is complete; a failure leaves nothing behind.

A process that is killed on the way leaves a hidden folder, which nobody takes for the finished one and which the next
writer of the same folder removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pangu_sigma.checkpoint.folder_locks import is_abandoned, lock_working_folder


@contextmanager
def working_folder(hidden: Path) -> Iterator[Path]:
    """Make and lock the folder `hidden`; the block fills it and gives it its final name.

    Whatever ends the block early, Ctrl-C too, removes the folder.
    """
    hidden.mkdir()
    with lock_working_folder(hidden):
        try:
            yield hidden
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def hidden_beside(final: Path) -> Path:
    """The hidden path under which this process writes the folder `final`."""
    return final.with_name(f"{_hidden_prefix(final)}{os.getpid()}")


def remove_abandoned(final: Path) -> None:
    """Remove the hidden folders that killed writers of `final` left. Raises OSError."""
    prefix = _hidden_prefix(final)
    for path in final.parent.glob(f"{prefix}*"):
        pid = path.name.removeprefix(prefix)
        if pid.isdecimal() and path.is_dir() and is_abandoned(path, int(pid)):
            shutil.rmtree(path)


def _hidden_prefix(final: Path) -> str:
    return f".{final.name}.unfinished-"
