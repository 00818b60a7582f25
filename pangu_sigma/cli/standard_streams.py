"""Standard output and error of a command: what nobody takes any more (`| head`, a closed terminal, a full disk) is
lost, and the command goes on."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class StandardStream(io.FileIO):
    """File descriptor 1 or 2 without errors: what cannot be written is dropped, and `failure` is the first reason.

    `forgiving`: False lets errors through, for a command that has nothing to do where nobody reads.
    """

    def __init__(self, descriptor: int, failure: OSError | None = None) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.failure = failure
        self.forgiving = True

    def write(self, data: bytes) -> int:
        """Write `data` or a part of it, and return how many bytes that was."""
        try:
            written = super().write(data)
            while written is None:  # a descriptor that does not block, and nobody reads just now
                select.select([], [self], [])
                written = super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            if not self.forgiving:
                raise OSError(error.errno, error.strerror, "standard output") from error
            return len(data)
        return written


def install_standard_streams() -> None:
    """Put streams that raise no errors in the place of `sys.stdout` and `sys.stderr`.

    A descriptor that was closed (`>&-`) becomes that of the null device: else the next file that is opened would get
    its number, and whatever is printed.
    """
    closed = [stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)]
    for descriptor in range(3):
        if closed[descriptor] and not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if closed[0]:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)


def _is_open(descriptor: int) -> bool:
    with suppress(OSError):
        os.fstat(descriptor)
        return True
    return False


def _stream(descriptor: int, before: TextIO | None) -> TextIO:
    failure = OSError(errno.EBADF, os.strerror(errno.EBADF)) if before is None else None
    raw = StandardStream(descriptor, failure)
    buffered = raw.isatty() or descriptor == 2
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",  # what the terminal's encoding lacks is shown, not raised
        line_buffering=buffered,
        write_through=bool(before and before.write_through),
    )


def output_failure() -> OSError | None:
    """Why standard output did not take all that was printed; None too where its reader just left (`| head`)."""
    raw = _raw_output()
    if raw is None:
        return None
    sys.stdout.flush()
    return None if raw.failure is None or raw.failure.errno == errno.EPIPE else raw.failure


def _raw_output() -> StandardStream | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw if isinstance(raw, StandardStream) else None


@contextmanager
def piped_output() -> Iterator[None]:
    """A context of a command whose work is its output: where nobody reads on, the context ends, quietly; other errors
    of standard output are raised. Text of any language goes out, whatever the locale says."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    raw = _raw_output()
    if raw is not None:
        raw.forgiving = False
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    finally:
        if raw is not None:
            raw.forgiving = True
