"""A text stream for progress and messages, which never ends the job that writes them."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO


class BestEffortStream:
    """Writes to `file` and passes over errors: a closed or broken stream, a full disk, no stream at all (None)."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write `text`, or lose it."""
        with suppress(OSError, ValueError, AttributeError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what is buffered, or lose it."""
        with suppress(OSError, ValueError, AttributeError):
            self._file.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(OSError, ValueError, AttributeError):
            return self._file.isatty()
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)
