"""Growing file: read line by line while others append to it; and standard input, copied into such a file.

Positions are byte offsets: a reader tells the offset of its next line, and another reader continues exactly there.
"""

import fcntl
import hashlib
import os
import select
import sys
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.errors import UserError
from pangu_sigma.regular_file import regular
from parallel.comm.plain_files import open_for_writing

LONGEST_LINE = 64 << 20  # bytes: a source without line ends must not fill the memory
_CHUNK = 1 << 20
_NOTICE_SECONDS = 0.2  # how long a thread that waits for input may take to notice that it is closed
_COMPARED = 64 << 10  # bytes at the beginning and before the cursor that tell one stream from another


@dataclass(frozen=True)
class StreamLine:
    """A complete line: its 1-based number, the byte offsets of its start and of the next line's, its content."""

    line_number: int
    start: int
    end: int
    content: bytes


class GrowingFileReader:
    """Reader of the complete lines of a growing file from byte ``offset`` on, which is the start of ``line_number``.

    A line is complete when its line end is there. Raises UserError where the file cannot be read or has shrunk.
    """

    def __init__(self, path: Path, offset: int = 0, line_number: int = 1):
        self.path = path
        self.offset = offset
        self.line_number = line_number
        self._buffer = bytearray()
        self._searched = 0
        try:
            self._file = open(regular(path), "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UserError(f"the stream {path} cannot be read ({error.strerror}): check data.stream.path") from error

    def next_line(self) -> StreamLine | None:
        """The next complete line, None while there is none."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                break
            self._searched = len(self._buffer)
            if not self._read_more():
                return None
        line = StreamLine(self.line_number, self.offset, self.offset + end + 1, bytes(self._buffer[:end]))
        del self._buffer[: end + 1]
        self._searched = 0
        self.offset, self.line_number = line.end, line.line_number + 1
        return line

    def _read_more(self) -> bool:
        if len(self._buffer) > LONGEST_LINE:
            raise UserError(
                f"{self.path}:{self.line_number}: the line has more than {LONGEST_LINE >> 20} MiB; a stream is one "
                "JSON object a line"
            )
        read_end = self.offset + len(self._buffer)
        size = os.fstat(self._file.fileno()).st_size
        if size < read_end:
            raise UserError(
                f"the stream {self.path} has shrunk to {size} bytes, and {read_end} were read already: "
                "append to it only"
            )
        chunk = os.pread(self._file.fileno(), _CHUNK, read_end)
        self._buffer += chunk
        return bool(chunk)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def digests_before(path: Path, end: int) -> dict[str, str]:
    """Hashes by which two files are compared before byte ``end``: of their first bytes and of the last before it.

    Raises UserError where the file is shorter or cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            first = stream.read(min(end, _COMPARED))
            stream.seek(max(0, end - _COMPARED))
            last = stream.read(min(end, _COMPARED))
    except OSError as error:
        raise UserError(f"the stream {path} cannot be read ({error.strerror}): check data.stream.path") from error
    if len(last) < min(end, _COMPARED):
        raise UserError(f"the stream {path} has fewer than the {end} bytes that the run has learned from: restore it")
    return {"first": hashlib.sha256(first).hexdigest(), "last": hashlib.sha256(last).hexdigest()}


class StandardInputSpool:
    """Spool of standard input: its bytes are appended to the file ``path`` as they arrive, so a killed run loses none.

    An unfinished last line of an earlier process is cut off; ``cut`` tells how many bytes. ``ended`` is true once the
    input has ended and stands in the file, its last line completed.
    The thread ``standard-input`` copies until then, or until ``close``; the file is read in the thread that samples.
    """

    def __init__(self, path: Path, descriptor: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.ended = False
        self.error: OSError | None = None
        # The descriptor itself: a buffered reader would hold its lock while the program ends.
        self._input = descriptor
        # Closed by the reading thread or close().
        self._file = open(open_for_writing(path, append=True), "ab", buffering=0)  # noqa: SIM115
        self.cut = self._cut_unfinished()
        self._closed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._copy, name="standard-input", daemon=True).start()

    def _cut_unfinished(self) -> int:
        size = self.path.stat().st_size
        complete = size  # bytes up to the end of the last complete line
        with open(self.path, "rb") as stream:
            while complete:
                start = max(0, complete - _CHUNK)
                stream.seek(start)
                line_end = stream.read(complete - start).rfind(b"\n")
                if line_end >= 0:
                    complete = start + line_end + 1
                    break
                complete = start
        os.truncate(self.path, complete)
        return size - complete

    def _copy(self) -> None:
        """What the thread runs."""
        last = b"\n"
        try:
            while not self._closed:
                if not select.select([self._input], [], [], _NOTICE_SECONDS)[0]:
                    continue
                chunk = os.read(self._input, _CHUNK)
                if not chunk:
                    break
                self._write(chunk)
                last = chunk[-1:]
            if last != b"\n":
                self._write(b"\n")
        except OSError as error:
            self.error = error
        self.ended = True

    def _write(self, data: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def secure(self) -> None:
        """Make what arrived so far survive a power cut."""
        with self._lock:
            if not self._closed:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            self._closed = True
            self._file.close()


def check_source(path: str, standard_input: str, notify: Callable[[str], None]) -> None:
    """Raises UserError, before anything is made, for a stream that is not there or holds nothing.

    Waits for the first byte of standard input.
    """
    if path == standard_input:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("standard input is a terminal: pipe documents into the command, one JSON object a line")
        if not select.select([0], [], [], 1.0)[0]:
            notify("waiting for the first document on standard input")
            select.select([0], [], [])
        if not _bytes_waiting(0):
            raise UserError("the stream on standard input is empty: pipe documents into it, one JSON object a line")
        return
    file = Path(path)
    if not file.exists():
        raise UserError(f"the stream {path} does not exist: create it, one JSON object a line, or check the path")
    if not file.is_file():
        raise UserError(f"the stream {path} is no file: name a .jsonl file, or - and pipe documents in")
    if file.stat().st_size == 0:
        raise UserError(f"the stream {path} is empty: append a document to it, one JSON object a line, then start")


def _bytes_waiting(descriptor: int) -> int:
    """How many bytes can be read without waiting: none of an input that has ended, or of a device such as /dev/null."""
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4), sys.byteorder)
    except OSError:
        return 0
