"""Files that a user names: only regular ones are opened, since a pipe or a device may never answer, or never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "it is a named pipe",
    stat.S_IFSOCK: "it is a socket",
    stat.S_IFCHR: "it is a device",
    stat.S_IFBLK: "it is a device",
}


def regular(path: Path) -> Path:
    """The path, to be opened for reading.

    Raises OSError, whose `strerror` says so, for a named pipe, a socket and a device; what is wrong with others shows
    when they are opened.
    """
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:
        return path
    if kind is not None:
        raise OSError(errno.EINVAL, f"{kind} and no regular file", str(path))
    return path


def read_at_most(path: Path, most: int) -> bytes:
    """The content of a regular file, of a larger one its first `most` + 1 bytes. Raises OSError.

    No more memory is taken than the file has bytes: `read(n)` takes n at first, whatever there is.
    """
    with open(regular(path), "rb") as stream:
        return stream.read(min(os.fstat(stream.fileno()).st_size, most) + 1)
