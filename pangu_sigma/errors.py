"""Errors that the command line turns into a sentence and an exit code, and the exit codes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Exit codes: a user's mistake; stopped by a signal before the job was done (a scheduler may start it again: EX_TEMPFAIL
# of sysexits.h); stopped by Ctrl-C.
USER_ERROR, STOPPED, INTERRUPTED = 2, 75, 130


class UserError(ValueError):
    """A mistake that the user can mend; the message is one sentence that says what is wrong, where, and what to do."""


class CheckpointError(UserError):
    """A checkpoint could not be written or is refused; the message names the file or folder and says what to do."""


# Of a thread, not of the process, as what is shown of progress.
_as_flags: ContextVar[bool] = ContextVar("whether arguments are spelled as flags", default=False)
SPELLING = "PANGU_SIGMA_SPELLING"  # environment of a command's worker: "python" where a Python program started it


def argument(name: str, value: object = None) -> str:
    """An argument in a message, as who called writes it: `top=5` in Python, `--top 5` on the command line."""
    flags = _as_flags.get()
    if value is None or (flags and isinstance(value, bool)):
        return f"--{'no-' * (value is False)}{name.replace('_', '-')}" if flags else name
    if flags:
        return f"--{name.replace('_', '-')} {value}"
    return f"{name}={value if isinstance(value, int | float) else repr(str(value))}"


@contextmanager
def arguments_as_flags() -> Iterator[None]:
    """Let messages within the block name arguments as the flags of the command line."""
    before = _as_flags.set(os.environ.get(SPELLING) != "python")
    try:
        yield
    finally:
        _as_flags.reset(before)


def spelled_as() -> dict[str, str]:
    """The environment by which the workers of this thread's job spell arguments as it does."""
    return {} if _as_flags.get() else {SPELLING: "python"}


# What the system answers about something else than files, and what only a bug can be the reason of.
_NOT_OF_FILES = {
    errno.EPIPE, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ESHUTDOWN, errno.EBADF, errno.EFAULT,
    errno.ECHILD, errno.ESRCH,
}  # fmt: skip


def disk_advice(number: int | None, alternative: str) -> str:
    """What to do about an OSError of the number `number`, where `alternative` says what to choose instead."""
    advice = {
        errno.ENOSPC: f"free some space or {alternative}",
        errno.EDQUOT: f"free some of your quota or {alternative}",
        errno.EFBIG: f"raise the limit on file sizes (ulimit -f) or {alternative}",
        errno.EACCES: f"make the folder writable or {alternative}",
        errno.EROFS: f"{alternative} on a disk that can be written",
        errno.EIO: f"check the disk, which fails, or {alternative}",
        errno.ELOOP: f"remove it or {alternative}",
        errno.EMFILE: "raise the limit on open files (ulimit -n)",
        errno.ENOMEM: "free some memory",
    }
    return advice.get(number or 0, f"mend that, or {alternative}")


@contextmanager
def disk_errors_explained(doing: str | None = None, alternative: str = "name another place") -> Iterator[None]:
    """Raise what the user's disk and folders answer as a UserError, whatever it is, and too little memory as one; also
    a decorator.

    doing: what failed, where the error itself does not name the file. Other OSErrors are bugs, and pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno in _NOT_OF_FILES:
            raise
        place = " ".join(str(part) for part in (doing, error.filename) if part) or "a file"
        raise UserError(f"{place}: {error.strerror}: {disk_advice(error.errno, alternative)}") from error
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        raise UserError(f"this machine has not enough memory for it{reason}: ask for less, or use another") from error
