"""Watchdog: every process of a job watches the others, so that one that died or hangs ends the job for all.

A process holds a lock on a file of its own in a folder that all share, as long as it lives; the system lets go of it
however the process ends. In the file stands how often the process has met the others, and the file is touched as long
as the process runs at all, so that those who wait in vain can say for whom. A daemon thread of each process
looks after the others, while the main thread computes: MindSpore waits in collectives without keeping Python's lock.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from parallel.comm.plain_files import open_for_writing

LOOK_SECONDS = 0.5
LEAVE_SECONDS = 0.05
HOLD_ATTEMPTS = 10
LEFT, DONE = b"left", b"done"  # in the file of a process that has come to the end, and that has ended
SILENT_SECONDS = 3.0  # a process whose file was not touched for so long does not run
LOST = 69  # exit code of a process that stopped because another one did: EX_UNAVAILABLE of sysexits.h
TIMED_OUT = 2


class Watchdog:
    """The watch of `rank` over all `size` ranks, by files in `folder`; `start` it when all have met.

    `timeout`: seconds without a mark after which this process gives up. `quiet`: somebody else tells of a lost rank.
    Raises BlockingIOError where another job watches in this folder.
    """

    def __init__(self, folder: Path, rank: int, size: int, timeout: float, quiet: bool = False) -> None:
        self.folder, self.rank, self.size, self.timeout, self.quiet = folder, rank, size, timeout, quiet
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open_for_writing(self._path(rank), mode=0o644)
        self._hold()
        self._meetings = -1
        self._marked = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.mark()

    def _hold(self) -> None:
        # Whoever looks after this rank holds the lock for a moment.
        for _ in range(HOLD_ATTEMPTS - 1):
            with suppress(BlockingIOError):
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(LOOK_SECONDS / 5)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def mark(self) -> None:
        """Note that this process goes on: it meets the others, or has work of its own done."""
        self._marked = time.monotonic()
        self._meetings += 1
        os.pwrite(self._file, b"%020d" % self._meetings, 0)

    def start(self) -> None:
        """Look after the others from now on."""
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Part when all have come here."""
        os.pwrite(self._file, LEFT.ljust(20), 0)
        while not all(self._path(rank).read_bytes().strip() in (LEFT, DONE) for rank in range(self.size)):
            time.sleep(LEAVE_SECONDS)
        self.close()

    def close(self) -> None:
        """This process is done: the others need not wait for it."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        os.pwrite(self._file, DONE.ljust(20), 0)
        os.close(self._file)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.alive"

    def _look(self) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        while not self._over.wait(LOOK_SECONDS):
            os.utime(self._file)
            for rank in others:
                if self._gone(rank) and not self._over.is_set():
                    self._end(LOST, "" if self.quiet else f"rank {rank} is gone: this process stops too")
            if time.monotonic() - self._marked > self.timeout and not self._over.is_set():
                behind = self._behind(others)
                waited = f"waited {self.timeout:g} s (parallel.timeout)"
                self._end(TIMED_OUT, f"Error: rank {self.rank} {waited} for {behind}: see its log, or raise the time")

    def _gone(self, rank: int) -> bool:
        """Whether a rank ended without being done."""
        handle = os.open(self._path(rank), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            return os.pread(handle, len(DONE), 0) != DONE
        finally:
            os.close(handle)

    def _behind(self, others: list[int]) -> str:
        """Who has met the others less often than this process, or else who has stopped on the same way."""
        late, silent = [], []
        now = os.fstat(self._file).st_mtime
        for rank in others:
            path = self._path(rank)
            with suppress(ValueError):
                if int(path.read_bytes()[:20]) < self._meetings:
                    late.append(str(rank))
            if now - path.stat().st_mtime > SILENT_SECONDS:
                silent.append(str(rank))
        named = late or silent
        return f"rank {', '.join(named)}" if named else "the other ranks"

    def _end(self, code: int, sentence: str) -> None:
        if sentence:
            print(sentence, file=sys.stderr, flush=True)
        sys.stdout.flush()
        # At once: MindSpore's own way out waits for processes that do not answer.
        os._exit(code)
