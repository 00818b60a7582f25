"""Errors that the command line turns into a sentence and an exit code, and the exit codes."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

USER_ERROR, INTERRUPTED = 2, 130  # of a process that ends by a user's mistake, or by Ctrl-C


class UserError(ValueError):
    """A mistake that the user can mend; the message is one sentence that says what is wrong, where, and what to do."""


class CheckpointError(UserError):
    """A checkpoint could not be written or is refused; the message names the file or folder and says what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that an unknown one resembles, as a question; the first ten of all where it resembles none."""
    names = list(known)
    near = get_close_matches(name[:200], names, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose one of {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"


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
