"""Errors that the command line turns into a sentence and an exit code, and the exit codes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches

USER_ERROR, INTERRUPTED = 2, 130  # of a process that ends by a user's mistake, or by Ctrl-C


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
