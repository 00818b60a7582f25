"""Lock on a run's folder: one job in it at a time.

A flock lock, which the system drops when the process that holds it ends, however it ends.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

from pangu_sigma.errors import UserError


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
