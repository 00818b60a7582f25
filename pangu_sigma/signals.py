"""Signals that ask a command to stop: Ctrl-C (SIGINT), SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2.

Jobs say what the first one does while they prepare (`stop_signals_raise`), while a module loads (`signals_held`) and
while a run trains (`StopSignalListener`): each lays a handler of Python's over the block in which it holds. Off the
main thread they change nothing. A command line also calls `take_signals_in_a_thread`, since MindSpore, each time it
compiles, puts a handler of its own in the place of Ctrl-C's, which turns it into SIGTERM.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pangu_sigma.errors import INTERRUPTED, STOPPED
from parallel.comm.stop_signals import INSISTENT, STOP_SIGNALS

COMPILING_LOOK_SECONDS = 0.1  # how soon a signal that waits for a graph is looked at again
Handler = Callable[[int, FrameType | None], None]


class StoppedBySignal(KeyboardInterrupt):
    """A signal other than Ctrl-C ended a job before it was done; `exit_code` is that of its command."""

    def __init__(self, signal_number: int, exit_code: int = STOPPED) -> None:
        super().__init__(signal_number)
        self.signal_number = signal.Signals(signal_number)
        self.exit_code = exit_code


def signal_name(signal_number: int) -> str:
    """What messages call a signal: "Ctrl-C", "SIGTERM", …"""
    return "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name


def exit_code(signal_number: int) -> int:
    """Exit code of a command that a signal stopped before it was done."""
    return INTERRUPTED if signal_number == signal.SIGINT else STOPPED


def interruption(signal_number: int, at_once: bool = False) -> KeyboardInterrupt:
    """The exception by which a signal ends what has nothing to save, or `at_once`, what had."""
    if signal_number == signal.SIGINT:
        return KeyboardInterrupt()
    return StoppedBySignal(signal_number, 128 + signal_number if at_once else STOPPED)


def interruption_message(error: KeyboardInterrupt) -> str:
    """The sentence by which a command ends that was interrupted before it was done."""
    number = getattr(error, "signal_number", signal.SIGINT)
    return "Interrupted." if number == signal.SIGINT else f"Stopped by {signal_name(number)}."


def may_handle_signals() -> bool:
    """Whether this thread may handle signals: the main thread; in others the program that they belong to decides."""
    return threading.current_thread() is threading.main_thread()


def _is_ours_to_handle(number: int) -> bool:
    """Whether the program has left a signal as it was: what it handles itself or ignores (nohup) is left to it."""
    handler = signal.getsignal(number)
    return number == signal.SIGINT or handler == signal.SIG_DFL or getattr(handler, "__module__", None) == __name__


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Let the signals that ask to stop call `handler` within the block; off the main thread nothing changes."""
    # All of them first: `handler` may change the others as soon as one is in place.
    numbers = STOP_SIGNALS if may_handle_signals() else ()
    previous = {number: signal.getsignal(number) for number in numbers if _is_ours_to_handle(number)}
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _default_from_now_on() -> None:
    """Let a further Ctrl-C or SIGTERM end the program at once."""
    for number in INSISTENT:
        if _is_ours_to_handle(number):
            signal.signal(number, signal.SIG_DFL)


def _is_in_cpp(frame: FrameType | None) -> bool:
    """Whether MindSpore compiles a graph or loads below this frame: its C++ ends the program by abort() at an exception
    of the Python that it calls, and what is half loaded fails in other ways."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        name = frame.f_code.co_name
        if module.startswith("mindspore") and (name == "<module>" or module.startswith("mindspore._extends")):
            return True
        if module == "mindspore.common.api" and name == "compile":
            return True
        frame = frame.f_back
    return False


def _main_thread_is_in_mindspore() -> bool:
    """Whether the main thread has called into MindSpore, whose C++ computes or compiles."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    return frame is not None and f"{frame.f_globals.get('__name__')}.".startswith("mindspore.")


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Let the signals that ask to stop raise KeyboardInterrupt, all but Ctrl-C a `StoppedBySignal`: what prepares or
    writes is then cleaned up, and the command says why it ended. While MindSpore compiles or loads they wait."""
    waiting: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        waiting[:] = [number]
        if not _is_in_cpp(frame):
            waiting.clear()
            raise interruption(number)
        timer = threading.Timer(COMPILING_LOOK_SECONDS, _thread.interrupt_main, (number,))
        timer.daemon = True
        timer.start()

    with _handled_by(interrupt):
        yield
        if waiting:
            raise interruption(waiting[0])


class StopSignalListener:
    """A context in which the first signal is only noted, so that the training loop can save and stop.

    signal_number: the signal once one came, else None. A second Ctrl-C or SIGTERM ends the program at once. The handler
    runs in the main thread, between two bytecodes; listening in another thread does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: signal.Signals | None = None
        self._handled = _handled_by(self._on_signal)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal came."""
        return self.signal_number is not None

    def __enter__(self) -> StopSignalListener:
        self._handled.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handled.__exit__(*exception)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or signal.Signals(number)
        if number in INSISTENT:
            _default_from_now_on()


@contextmanager
def signals_held() -> Iterator[None]:
    """Deliver a signal only when the block has ended; a second Ctrl-C or SIGTERM ends the program at once.

    A C++ module that is interrupted while it loads reports a failed import instead of the interruption.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number in INSISTENT:
            # An exception would come up in the middle of C++, which aborts.
            _default_from_now_on()

    try:
        with _handled_by(note):
            yield
    finally:
        if came:
            handler = signal.getsignal(came[0])
            if callable(handler):
                handler(came[0], None)
            else:
                os.kill(os.getpid(), came[0])


def restore_ctrl_c() -> None:
    """Give Ctrl-C back to Python's handler, in whose place MindSpore leaves one that ends the program by SIGTERM."""
    handler = signal.getsignal(signal.SIGINT)
    if may_handle_signals() and handler is not None:
        signal.signal(signal.SIGINT, handler)


def take_signals_in_a_thread() -> SignalThread:
    """From now on, let a thread take the signals that ask this process to stop, and have Python's handlers called in
    the main thread, whatever handlers MindSpore puts below them.

    For a command line, before any other thread is there: all that come later inherit that these signals are blocked.
    What the process was started to ignore (nohup) stays ignored, but for Ctrl-C.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before))
    thread = SignalThread(numbers)
    thread.start()
    return thread


class SignalThread(threading.Thread):
    """Takes blocked signals as they come. The first is given to the main thread, whose handler says what it does.

    After it only a Ctrl-C or SIGTERM that repeats one counts. It ends the process at once with 128 + its number, unless
    whoever handles it is not of this module (a server, a launcher) and listens.

    final_code: the exit code of a command that is over; a signal from then on only hastens its end.
    """

    PATIENCE_SECONDS = 1.0  # how long the main thread may take to notice a first signal before a second one ends it
    LOOK_SECONDS = 0.02

    def __init__(self, numbers: list[signal.Signals]) -> None:
        super().__init__(name="signals", daemon=True)
        self.numbers = numbers
        self.final_code: int | None = None
        self._noticed = True
        # Of no other use: it ends whatever system call the main thread waits in, and its handler runs after the others.
        signal.signal(signal.SIGURG, self._on_nudge)

    def _on_nudge(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True

    def run(self) -> None:
        """Take signals as long as the process lives."""
        number = self._next()
        if self._is_handled(number):
            self._forward(number)
        else:
            # No command runs yet, or none does any more.
            self._end(exit_code(number), interruption_message(interruption(number)))
        insisted = number in INSISTENT
        while True:
            number = self._next()
            if number not in INSISTENT:
                continue
            if insisted or number == signal.SIGINT:
                self._take_second(number)
            insisted = True

    def _next(self) -> int:
        number = signal.sigwait(self.numbers)
        if self.final_code is not None:
            os._exit(self.final_code)
        return number

    def _take_second(self, number: int) -> None:
        deadline = time.monotonic() + self.PATIENCE_SECONDS
        while not self._noticed and time.monotonic() < deadline:
            time.sleep(self.LOOK_SECONDS)
        foreign = getattr(signal.getsignal(number), "__module__", None) != __name__
        if self._noticed and foreign and self._is_handled(number):
            self._forward(number)
        else:
            self._end(128 + number)

    @staticmethod
    def _is_handled(number: int) -> bool:
        handler = signal.getsignal(number)
        return callable(handler) and handler != signal.default_int_handler

    def _forward(self, number: int) -> None:
        self._noticed = False
        _thread.interrupt_main(number)
        _thread.interrupt_main(signal.SIGURG)
        for _ in range(3):  # the call may begin just after a nudge
            # Where oneDNN multiplies, a real signal's frame would overwrite memory of the heap (see kernels/pool.c).
            if not _main_thread_is_in_mindspore():
                with suppress(OSError):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGURG)
            time.sleep(self.LOOK_SECONDS)

    @staticmethod
    def _end(code: int, message: str = "") -> None:
        with suppress(Exception):
            if message:
                print(message, file=sys.stderr, flush=True)
        os._exit(code)
