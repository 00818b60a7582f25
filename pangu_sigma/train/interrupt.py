"""Ctrl-C and SIGTERM ask the loop to save and stop; a second one ends the program at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interruption:
    """A context in which the first SIGINT or SIGTERM sets `asked`; `name` says which it was."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.name is not None

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread only; elsewhere the embedding program decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def renew(self) -> None:
        """Listen again: MindSpore may leave a handler of its own behind, which turns Ctrl-C into SIGTERM."""
        if not self.asked and signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        for known in self._previous:
            signal.signal(known, signal.SIG_DFL if known != signal.SIGINT else signal.default_int_handler)
