"""Errors that the command line turns into a sentence and an exit code, and the exit codes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR, INTERRUPTED = 2, 130  # of a process that ends by a user's mistake, or by Ctrl-C


class UserError(ValueError):
    """A mistake that the user can mend; the message is one sentence that says what is wrong, where, and what to do."""


class CheckpointError(UserError):
    """A checkpoint could not be written or is refused; the message names the file or folder and says what to do."""


# What the user's disk and folders answer, where no job says it better. Other OSErrors are bugs.
_DISK_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip


@contextmanager
def disk_errors_explained() -> Iterator[None]:
    """Raise what the user's disk and folders answer as a UserError; also a decorator."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = error.filename or "a file"
        raise UserError(f"{place}: {error.strerror}: mend that, or name another place") from error
