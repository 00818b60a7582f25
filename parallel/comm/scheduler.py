"""Scheduler of a job under msrun: brings the processes together, and ends when they have.

MindSpore's own scheduler waits for processes that never came (they were refused, or failed before they met), and msrun
waits for the scheduler. So a process beside it looks whether any process of the job still runs on this machine.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from parallel.comm.launch import TIED_TO_PARENT, schedule
from parallel.comm.processes import WORKER

LOOK_SECONDS = 0.25
GRACE_SECONDS = 3.0  # for the scheduler, once the processes have ended
START_SECONDS = 120.0  # until the first process must have been seen


def schedule_for_msrun() -> int:
    """Be the scheduler of a job that msrun started; returns its exit code, 0 too where it was ended because the job is
    over: how that went, msrun knows from the processes themselves."""
    watching = os.getpid()
    # Before MindSpore, whose scheduler keeps Python's lock while it waits, so that no thread could look.
    scheduler = os.fork()
    if scheduler == 0:
        ctypes.CDLL(None).prctl(TIED_TO_PARENT, signal.SIGKILL)
        if os.getppid() == watching:
            schedule()
        return 0
    seen, last_seen = False, time.monotonic()
    while True:
        ended, status = os.waitpid(scheduler, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        now = time.monotonic()
        if running_workers(os.environ):
            seen, last_seen = True, now
        elif now - last_seen > (GRACE_SECONDS if seen else START_SECONDS):
            os.kill(scheduler, signal.SIGKILL)
            return 0
        time.sleep(LOOK_SECONDS)


def running_workers(environment: Mapping[str, str]) -> list[int]:
    """Process numbers of the job's workers on this machine: processes of this process's own command, with the
    `environment`'s scheduler."""
    command = Path("/proc/self/cmdline").read_bytes()
    port = f"MS_SCHED_PORT={environment.get('MS_SCHED_PORT')}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes() != command:
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended just now, or is somebody else's
            continue
        if f"MS_ROLE={WORKER}".encode() in variables and port in variables:
            found.append(int(folder.name))
    return found
