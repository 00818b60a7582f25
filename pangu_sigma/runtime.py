"""MindSpore in this process: its settings, made once before it is imported anywhere else, and whose turn it is."""

from __future__ import annotations

import os
import threading
from contextlib import ContextDecorator
from pathlib import Path

from pangu_sigma.signals import restore_ctrl_c, signals_held
from parallel.operator_layout import LOCAL_SLICES, NESTED_CALLS


class Turn(ContextDecorator):
    """Reentrant lock that goes to a thread that waits before the one that has just released it can have it again.

    A plain lock would mostly go back to a thread that computes step after step.
    """

    def __init__(self) -> None:
        self._queue, self._turn = threading.RLock(), threading.Lock()
        self._owner, self._depth = 0, 0

    def __enter__(self) -> Turn:
        if self._owner != threading.get_ident():
            with self._queue:
                self._turn.acquire()
            self._owner = threading.get_ident()
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            restore_ctrl_c()
            self._owner = 0
            self._turn.release()


# Held by the thread that compiles or runs graphs: MindSpore takes one at a time. One of the process, as MindSpore is.
COMPUTING = Turn()


def prepare(device: str, scratch: Path | None = None) -> None:
    """Import MindSpore quietly and set it up: graph mode on `device`, its own files under `scratch`.

    Raises UserError where the device is not there.
    """
    # MindSpore's C++ side logs to the terminal, over the progress bar; errors reach the user as exceptions.
    os.environ.setdefault("GLOG_v", "4")
    os.environ.setdefault("MS_DEV_JIT_SYNTAX_LEVEL", "2")
    # Not a matter of taste: without it pipeline stages would compute other rows.
    os.environ.update(LOCAL_SLICES)
    with signals_held():
        import mindspore

    from mindspore.communication import GlobalComm

    from pangu_sigma.errors import UserError

    try:
        # Processes that have met are numbered devices to MindSpore; once they compute, the number cannot be set again.
        if not GlobalComm.INITED:
            mindspore.set_device(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"run.device is {device}, which MindSpore cannot use on this machine; set run.device=CPU or install CANN"
        ) from error
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_recursion_limit(NESTED_CALLS)
    if scratch is not None:
        mindspore.set_context(save_graphs_path=str(scratch))
