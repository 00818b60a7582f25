"""Job launcher: starts the processes of a job on this machine, watches over them, and ends them all together.

Each gets what msrun would tell it through its environment, so that it need not know who started it. A scheduler process
brings them together (MindSpore's own); the port is a free one of the loopback interface.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import BinaryIO

from parallel.comm.plain_files import open_for_writing
from parallel.comm.processes import PATIENCE, SCHEDULER, WEEK, WORKER
from parallel.comm.stop_signals import INSISTENT, STOP_SIGNALS
from parallel.comm.watchdog import LOST

LAUNCHER = "PANGU_SIGMA_LAUNCHER"  # environment: the process number of who started a worker
WATCHED = "PANGU_SIGMA_WORKERS"  # environment: the folder in which workers know of each other
LOOK_SECONDS = 0.1
# How long the others have to stop by themselves when one has failed; each looks after the others twice a second.
GRACE_SECONDS = 10.0
TIED_TO_PARENT = 1  # prctl's PR_SET_PDEATHSIG
# Between two attempts to reach the scheduler, and between two signs of life to it. Whole seconds: below 1 MindSpore's
# thread of every process sends them without a pause, which costs 0.4 of a processor each.
RETRY_SECONDS = "1"


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    `codes`: exit code of each rank, negative for the signal that killed it; `failed_rank`: the rank that failed first,
    or None; `received_signal`: the signal by which this process was asked to end the job, or None; `ended_at_once`:
    whether a further one insisted, so that the processes were killed.
    """

    codes: tuple[int, ...]
    failed_rank: int | None
    received_signal: int | None
    ended_at_once: bool

    @property
    def cause(self) -> str:
        """How the rank that failed first ended."""
        code = self.codes[self.failed_rank]
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Launch:
    """The processes `words` (a command), `size` times; a context that leaves none behind.

    Rank 0 has this process's terminal for its messages, unless `quiet`, and its results (standard output) go to
    `results`; what the others say goes to `folder`/rank-N.log.
    """

    def __init__(
        self, words: Sequence[str], size: int, folder: Path, quiet: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.words, self.size, self.folder, self.quiet = list(words), size, folder, quiet
        self.environment = environment
        self.workers: list[subprocess.Popen] = []
        self.scheduler: subprocess.Popen | None = None
        self.received_signal: int | None = None
        self._insisted = self._ended_at_once = False
        self._previous: dict[int, object] = {}

    def log(self, rank: int) -> Path:
        """The log of a rank other than 0, or where all are quiet, of any."""
        return self.folder / f"rank-{rank}.log"

    @property
    def results(self) -> Path:
        """The file of what rank 0 writes to standard output."""
        return self.folder / "rank-0.out"

    def __enter__(self) -> Launch:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            for signum in STOP_SIGNALS:
                if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:  # nohup
                    self._previous[signum] = signal.signal(signum, self._pass_on)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for process in (*self.workers, self.scheduler):
            if process is not None and process.poll() is None:
                process.kill()
        for process in (*self.workers, self.scheduler):
            if process is not None:
                process.wait()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def wait(self) -> JobResult:
        """Wait until all have ended; where one fails, the others are ended too."""
        failed, deadline = None, None
        while any(worker.poll() is None for worker in self.workers):
            time.sleep(LOOK_SECONDS)
            if failed is None:
                failed = self._first_failed()
                if failed is not None:
                    deadline = time.monotonic() + GRACE_SECONDS
            elif time.monotonic() > deadline:
                for worker in self.workers:
                    if worker.poll() is None:
                        worker.kill()
        codes = tuple(worker.wait() for worker in self.workers)
        if failed is None:
            failed = self._first_failed()
        return JobResult(codes, failed, self.received_signal, self._ended_at_once)

    def _first_failed(self) -> int | None:
        """A rank that failed of itself; one that stopped because another did only if there is no such rank."""
        codes = [worker.poll() for worker in self.workers]
        of_itself = [rank for rank, code in enumerate(codes) if code not in (None, 0, LOST)]
        return of_itself[0] if of_itself else None

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            **self.environment,
            "MS_WORKER_NUM": str(self.size),
            "MS_SCHED_HOST": "127.0.0.1",
            "MS_SCHED_PORT": str(free_port()),
            "MS_RETRY_INTERVAL_LOWER": RETRY_SECONDS,
            "MS_RETRY_INTERVAL_UPPER": RETRY_SECONDS,
            # Whoever is missing is noticed here; rank 0 may first have a large corpus to tokenise.
            "MS_TOPO_TIMEOUT": WEEK,
            LAUNCHER: str(os.getpid()),
            WATCHED: str(self.folder.absolute()),
        }
        with _opened(self.folder / "scheduler.log") as log:
            self.scheduler = subprocess.Popen(
                [sys.executable, "-m", "parallel.comm.launch"],
                env={**environment, "MS_ROLE": SCHEDULER}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        processors = sorted(os.sched_getaffinity(0))
        # Threads that wait for work spin: where processes are more than processors, each keeps to one as well.
        share = max(1, len(processors) // self.size)
        for rank in range(self.size):
            own = {**environment, "MS_ROLE": WORKER, "MS_NODE_ID": str(rank), "RANK_ID": str(rank)}
            # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
            common = {"env": own, "stdin": subprocess.DEVNULL, "start_new_session": True}
            with ExitStack() as files:
                errors = None if rank == 0 and not self.quiet else files.enter_context(_opened(self.log(rank)))
                results = files.enter_context(_opened(self.results)) if rank == 0 else errors
                worker = subprocess.Popen(self.words, stdout=results, stderr=errors, **common)
            self.workers.append(worker)
            first = rank * share % len(processors)
            os.sched_setaffinity(worker.pid, processors[first : first + share])

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        again = self.received_signal is not None
        if again and signum not in INSISTENT:
            return
        if again and (signum == signal.SIGINT or self._insisted):
            self._ended_at_once = True
        self.received_signal = signum if self._ended_at_once else self.received_signal or signum
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL if self._ended_at_once else signum)
        self._insisted = self._insisted or signum in INSISTENT


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_launcher() -> bool:
    """In a process of a `Launch`: end when the launcher ends, however it does. False if nobody launched this one."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return False
    ctypes.CDLL(None).prctl(TIED_TO_PARENT, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(LOST)
    return True


def schedule() -> None:
    """Be the scheduler of a job: bring its processes together, and return when they have ended."""
    import mindspore
    from mindspore.communication import init

    mindspore.set_device("CPU")
    os.environ.setdefault(PATIENCE, WEEK)
    init("mccl")


def _opened(path: Path) -> BinaryIO:
    return open(open_for_writing(path, truncate=True), "wb")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the launcher may take its signals in a thread
    end_with_launcher()
    schedule()
