"""Ctrl-C and SIGTERM: what they do while a job prepares, while a module loads, and while a run trains."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def _handled_by(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Let these signals call `handler` within the block; off the main thread nothing changes."""
    # All of them first: `handler` may change the others as soon as one is in place.
    previous = {number: signal.getsignal(number) for number in numbers if may_handle_signals()}
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def sigterm_as_ctrl_c() -> AbstractContextManager[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that it ends a preparation as Ctrl-C does: cleaned up and said."""
    return _handled_by(signal.default_int_handler, signal.SIGTERM)


class StopSignalListener:
    """A context in which the first SIGINT or SIGTERM is only noted, so that the training loop can save and stop.

    signal_name: "Ctrl-C" or "SIGTERM" once one came, else None. A second signal ends the program at once. The handler
    runs in the main thread, between two bytecodes; listening in another thread does nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._handled = _handled_by(self._on_signal, *STOP_SIGNALS)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal came."""
        return self.signal_name is not None

    def __enter__(self) -> StopSignalListener:
        self._handled.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handled.__exit__(*exception)

    def _on_signal(self, signal_number: int, frame: FrameType | None) -> None:
        self.signal_name = "Ctrl-C" if signal_number == signal.SIGINT else "SIGTERM"
        # From now on each signal does what it does to any Python program.
        for caught in STOP_SIGNALS:
            signal.signal(caught, signal.SIG_DFL if caught != signal.SIGINT else signal.default_int_handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM only when the block has ended; a second one ends the program at once.

    A C++ module that is interrupted while it loads reports a failed import instead of the interruption.
    """
    came: list[int] = []

    def note(received: int, frame: FrameType | None) -> None:
        came.append(received)
        # An exception would come up in the middle of C++, which aborts.
        for caught in STOP_SIGNALS:
            signal.signal(caught, signal.SIG_DFL)

    try:
        with _handled_by(note, *STOP_SIGNALS):
            yield
    finally:
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
