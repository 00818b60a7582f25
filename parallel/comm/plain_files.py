"""Opening a file for writing that may be there already: a plain file alone, never through a link, no FIFO.

Else a link in a run's folder lets a job write to what it points to, and a FIFO lets it wait for ever. New files in
folders that nobody else knows of yet are opened with `x` instead; whole files are replaced by a rename.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

NO_PLAIN_FILE = "a link, a folder or something else than a plain file stands there"


def open_for_writing(path: Path | str, *, append: bool = False, truncate: bool = False, mode: int = 0o666) -> int:
    """Descriptor for reading and writing of the plain file `path`, made if it is not there.

    Raises OSError: ELOOP with `NO_PLAIN_FILE` for whatever else stands there, which is left as it is.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    try:
        handle = os.open(path, flags, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise OSError(errno.ELOOP, NO_PLAIN_FILE, str(path)) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ELOOP, NO_PLAIN_FILE, str(path))
        if truncate:
            os.ftruncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle
