"""Ctrl-C and SIGTERM outside the training loop: neither is lost, and neither ends in a traceback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that it ends a preparation as Ctrl-C does: cleaned up and said."""
    if not _may_handle():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def signals_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM only when the block has ended.

    A C++ module that is interrupted while it loads reports a failed import instead of the interruption.
    """
    if not _may_handle():
        yield
        return
    came: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _may_handle() -> bool:
    # Python delivers signals to the main thread only; elsewhere the embedding program decides.
    return threading.current_thread() is threading.main_thread()
