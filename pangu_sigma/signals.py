"""Ctrl-C and SIGTERM: what they do while a job prepares, while a module loads, and while a run trains."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that it ends a preparation as Ctrl-C does: cleaned up and said."""
    if not may_handle_signals():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopSignalListener:
    """A context in which the first SIGINT or SIGTERM is only noted, so that the training loop can save and stop.

    signal_name: "Ctrl-C" or "SIGTERM" once one came, else None. A second signal ends the program at once. The handler
    runs in the main thread, between two bytecodes; listening in another thread does nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a signal came."""
        return self.signal_name is not None

    def __enter__(self) -> StopSignalListener:
        if may_handle_signals():
            for signal_number in (signal.SIGINT, signal.SIGTERM):
                self._previous[signal_number] = signal.signal(signal_number, self._on_signal)
        return self

    def reinstall(self) -> None:
        """Listen again: MindSpore may leave a handler of its own behind, which turns Ctrl-C into SIGTERM."""
        if not self.stop_requested and signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(self, *exception: object) -> None:
        for signal_number, handler in self._previous.items():
            signal.signal(signal_number, handler)

    def _on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        self.signal_name = "Ctrl-C" if signal_number == signal.SIGINT else "SIGTERM"
        # From now on each signal does what it does to any Python program.
        for caught in self._previous:
            signal.signal(caught, signal.SIG_DFL if caught != signal.SIGINT else signal.default_int_handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM only when the block has ended; a second one ends the program at once.

    A C++ module that is interrupted while it loads reports a failed import instead of the interruption.
    """
    if not may_handle_signals():
        yield
        return
    came: list[int] = []

    def note(received: int, frame: FrameType | None) -> None:
        came.append(received)
        # An exception would come up in the middle of C++, which aborts.
        for caught in previous:
            signal.signal(caught, signal.SIG_DFL)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def restore_ctrl_c() -> None:
    """Give Ctrl-C back to Python's handler, in whose place MindSpore leaves one that ends the program by SIGTERM."""
    handler = signal.getsignal(signal.SIGINT)
    if may_handle_signals() and handler is not None:
        signal.signal(signal.SIGINT, handler)


def may_handle_signals() -> bool:
    """Whether this thread may handle signals: the main thread; in others the program that they belong to decides."""
    return threading.current_thread() is threading.main_thread()
