"""Many runs, some at a time, each on processors of its own; what is finished is not run again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pangu_sigma.monitor.progress import progress


@dataclass(frozen=True)
class Job:
    """One process: how it starts, where it says what it does, how one sees that it is finished, what comes after.

    `command` may prepare files; it is called when the job starts.
    """

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    finished: Callable[[], bool]
    after: Callable[[], None] = lambda: None


class Failed(Exception):
    """A job ended with an error; the message is the last that it said."""


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Run what is not finished, `at_once` processes at a time.

    Raises Failed when one fails, KeyboardInterrupt after an interruption, when the others have saved their state.
    """
    waiting = deque(job for job in jobs if not job.finished())
    processors = sorted(os.sched_getaffinity(0))
    share = max(1, len(processors) // at_once)
    free = deque(set(processors[n * share : (n + 1) * share] or processors) for n in range(at_once))
    running: list[tuple[Job, subprocess.Popen, set[int]]] = []
    with progress("runs", len(jobs), unit="runs") as bar:
        bar.set(len(jobs) - len(waiting))
        try:
            while waiting or running:
                while waiting and free:
                    job, own_processors = waiting.popleft(), free.popleft()
                    running.append((job, _start(job, own_processors), own_processors))
                time.sleep(0.5)
                for entry in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove(entry)
                    job, _, own_processors = entry
                    free.append(own_processors)
                    if not job.finished():
                        raise Failed(f"{job.name}: {last_line(job.log)} (all of it: {job.log})")
                    job.after()
                    bar.advance()
        finally:
            for _, process, _ in running:
                process.send_signal(signal.SIGINT)
            for _, process, _ in running:
                process.wait()


def _start(job: Job, processors: set[int]) -> subprocess.Popen:
    command = [str(word) for word in job.command()]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Its own process group: Ctrl-C reaches it once, from here.
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, processors),  # noqa: PLW1509 - nothing else runs here
        )


def last_line(log: Path) -> str:
    """The last line that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
