"""A run's folder belongs to one trainer at a time."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

from pangu_sigma.errors import UserError


def locked_folder(folder: Path, taken: str = "another process is training in") -> TextIO:
    """Make the run's folder if needed and hold it against a second trainer; close the result to let it go.

    The lock goes with the process, however it ends. Raises UserError if the folder cannot be written or is taken.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - held for the length of the run
    except OSError as error:
        raise UserError(f"run.dir {folder} cannot be written ({error.strerror}): choose another folder") from error
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise UserError(f"{taken} {folder}: wait for it or set another run.dir") from error
    return stream
