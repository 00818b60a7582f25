"""Progress of long jobs on stderr: a bar on a terminal, one in the page of a notebook, plain lines now and then
anywhere else; and nothing at all where the caller's `progress_shown` says so.

Results belong on stdout; nothing here writes there. Only one of these objects may be open at a time; a job within a
training run is opened by `TrainingProgress.job`, which draws under the run's bar.
"""

import html
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from pangu_sigma.monitor.best_effort_stream import BestEffortStream
from pangu_sigma.monitor.printable_text import compact, duration, printable, printable_lines

Clock = Callable[[], float]

# Of a thread, not of the process: a job that is shown may run beside one that is not.
_shown: ContextVar[bool] = ContextVar("whether progress is shown", default=True)


def is_progress_shown() -> bool:
    """Whether jobs of this thread show their progress and messages."""
    return _shown.get()


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Show what jobs within the block tell of their progress, or hide it; messages then go to the logger
    `pangu_sigma`, as information or as warnings."""
    before = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(before)


def report(message: str, level: int = logging.INFO) -> None:
    """Say one thing outside of any job: a line on stderr, under the cell of a notebook, or where progress is hidden, of
    the logger at `level`."""
    if not _shown.get():
        Hidden().say(message, level)
    else:
        # A notebook paints what comes on stderr as if something were wrong.
        file = BestEffortStream(sys.stdout if _in_notebook() else sys.stderr)
        PlainLines(file, time.monotonic).say(message)


class Pace:
    """Units per second over the last minute or so of updates, so that a slow first step is soon forgotten."""

    WINDOW_SECONDS = 60.0
    SHORTEST_SECONDS = 0.1

    def __init__(self, done: float, clock: Clock) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, float]] = deque([(clock(), done)])

    def update(self, done: float) -> None:
        """Note that `done` units are finished now."""
        now = self._clock()
        if len(self._marks) > 1 and now - self._marks[-2][0] < self.SHORTEST_SECONDS:
            self._marks.pop()  # thousands of updates a second need no mark each
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > self.WINDOW_SECONDS:
            self._marks.popleft()

    def rate(self) -> float | None:
        """Units per second; None before the first measurable progress."""
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return (after - before) / (last - first) if last > first and after > before else None

    def forget(self) -> None:
        """Begin measuring at the last update: used after the first one, which holds compilation."""
        last = self._marks[-1]
        self._marks = deque([last])


class Job:
    """A job under way: `advance` or `set` what is finished. Made by `progress` and `TrainingProgress.job`."""

    def __init__(self, description: str, total: float | None, unit: str, start: float, clock: Clock) -> None:
        self.description = printable(description)
        self.total, self.unit, self.done, self.start = total, unit, start, start
        self.pace = Pace(start, clock)
        self.note = ""
        self._listeners: list[Callable[[Job], None]] = []

    def advance(self, amount: float = 1) -> None:
        """`amount` more units are finished."""
        self.set(self.done + amount)

    def set(self, done: float) -> None:
        """`done` units are finished in all."""
        self.done = done
        self.pace.update(done)
        for listener in self._listeners:
            listener(self)

    def on_change(self, listener: Callable[["Job"], None]) -> None:
        """Call `listener(job)` after each change."""
        self._listeners.append(listener)

    def counts(self) -> str:
        """Finished and total, e.g. `120/400 documents`."""
        total = "" if self.total is None else f"/{self._amount(self.total)}"
        return f"{self._amount(self.done)}{total} {self.unit}"

    def speed(self) -> str:
        """Rate and remaining time, e.g. `52.1 documents/s, 0:12 left`; empty before anything is known."""
        rate = self.pace.rate()
        parts = [self.note] if self.note else [f"{compact(rate)} {self.unit}/s"] if rate else []
        if rate and self.total is not None and self.total > self.done:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def line(self) -> str:
        """The whole state as one plain line."""
        percent = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        speed = self.speed()
        return f"{self.description}: {self.counts()}{percent}{', ' + speed if speed else ''}"

    def _amount(self, value: float) -> str:
        return compact(value) if self.unit in ("B", "bytes") else f"{value:,.0f}"


class PlainLines:
    """Where stderr is no terminal: a line each 10 s (60 s in a long job) and each 5 %, but at most one a second."""

    SHORTEST, LONGEST, LEAST_GAP, SHARE = 10.0, 60.0, 1.0, 0.05

    def __init__(self, file: TextIO, clock: Clock) -> None:
        self._file, self._clock = file, clock

    def watch(self, job: Job, last_line: bool = False) -> Callable[[], None]:
        """Print the job's line when it is due, at its end only with `last_line` (else whoever opened the job has a line
        of its own then); returns what stops watching."""
        began = printed = self._clock()
        printed_done = job.done

        def changed(job: Job) -> None:
            nonlocal printed, printed_done
            now = self._clock()
            interval = min(self.LONGEST, max(self.SHORTEST, (now - began) / 100))
            next_share = math.inf if job.total is None else printed_done + self.SHARE * job.total
            share_due = job.done >= next_share and now - printed >= self.LEAST_GAP
            finished = job.total is not None and job.done >= job.total
            due = last_line if finished else share_due or now - printed >= interval
            if job.done > printed_done and due:
                self.say(job.line())
                printed, printed_done = now, job.done

        job.on_change(changed)
        return lambda: None

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Print a line."""
        print(printable_lines(message), file=self._file, flush=True)

    def close(self) -> None:
        """Nothing is held open."""


class Bars:
    """On a terminal: rich draws the bars; lines are printed above them."""

    def __init__(self, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        def text(field: str, style: str = "none") -> TextColumn:
            return TextColumn(field, markup=False, style=style, table_column=Column(no_wrap=True))

        columns = (
            text("{task.description}"),
            BarColumn(bar_width=None),
            text("{task.fields[counts]}"),
            text("{task.fields[speed]}", style="cyan"),
        )
        # stdout stays the caller's: rich would otherwise send it to stderr while a bar stands.
        self._progress = Progress(
            *columns, console=Console(file=file), expand=True, redirect_stdout=False, refresh_per_second=5
        )
        self._progress.start()

    def watch(self, job: Job, last_line: bool = False) -> Callable[[], None]:
        """Draw a bar for the job (which shows its last state anyway); returns what takes it away."""
        task = self._progress.add_task(
            job.description, total=job.total, completed=job.done, counts=job.counts(), speed=job.speed()
        )

        def changed(job: Job) -> None:
            self._progress.update(task, completed=job.done, counts=job.counts(), speed=job.speed())

        job.on_change(changed)
        return lambda: self._progress.remove_task(task)

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Print a line above the bars."""
        self._progress.console.print(printable_lines(message), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        self._progress.stop()


class NotebookBars:
    """In a notebook: one output under the cell, drawn anew while jobs go on; the last lines stand above the bars."""

    LEAST_GAP, LINES = 0.2, 20

    def __init__(self, clock: Clock) -> None:
        from IPython.display import display

        self._clock, self._drawn = clock, -math.inf
        self._jobs: list[Job] = []
        self._lines: deque[str] = deque(maxlen=self.LINES)
        self._output = display(self, display_id=True)

    def watch(self, job: Job, last_line: bool = False) -> Callable[[], None]:
        """Draw a bar for the job (which shows its last state anyway); returns what takes it away."""
        self._jobs.append(job)
        job.on_change(lambda _: self._draw())

        def remove() -> None:
            self._jobs.remove(job)
            self._draw(at_once=True)

        return remove

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Print a line above the bars."""
        self._lines.append(printable_lines(message))
        self._draw(at_once=True)

    def close(self) -> None:
        """Draw the last state."""
        self._draw(at_once=True)

    def _draw(self, at_once: bool = False) -> None:
        now = self._clock()
        if at_once or now - self._drawn >= self.LEAST_GAP:
            self._drawn = now
            self._output.update(self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        lines = list(self._lines)
        bars = [
            f"<div><progress value='{job.done}' max='{job.total}'></progress> {html.escape(job.line())}</div>"
            if job.total
            else f"<div>{html.escape(job.line())}</div>"
            for job in self._jobs
        ]
        text = html.escape("\n".join(lines))
        return {
            "text/plain": "\n".join([*lines, *(job.line() for job in self._jobs)]),
            "text/html": (f"<pre style='margin:0'>{text}</pre>" if text else "") + "".join(bars),
        }


class Hidden:
    """Where nobody asked for progress: messages go to the logger, bars nowhere."""

    def watch(self, job: Job, last_line: bool = False) -> Callable[[], None]:
        """Nothing is drawn."""
        return lambda: None

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Log the message."""
        logging.getLogger("pangu_sigma").log(level, "%s", message)

    def close(self) -> None:
        """Nothing is held open."""


Screen = Bars | NotebookBars | PlainLines | Hidden


class TrainingProgress:
    """The one bar of a training run: step, loss, tokens per second, remaining time. A context manager.

    `total_steps` is where the run ends and `start_step` where it begins (above 0 after a resume). Writes to `file`,
    stderr by default: a bar if that is a terminal, else plain lines at intervals, without control characters.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, file: TextIO | None = None, clock: Clock = time.monotonic
    ) -> None:
        self._file, self._clock = file, clock
        self._job = Job("training", total_steps, "steps", start_step, clock)
        self._screen: Screen | None = None

    def __enter__(self) -> "TrainingProgress":
        self._screen = _screen(self._file, self._clock)
        self._screen.watch(self._job, last_line=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._screen.close()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Step `step` is done; `loss` in nats per token."""
        first = self._job.done == self._job.start
        self._job.note = f"loss {loss:.4f}, {compact(tokens_per_second)} tokens/s"
        self._job.set(step)
        if first:
            self._job.pace.forget()

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Print a message (several lines allowed) above the bar; `level` is that of the log where progress is
        hidden."""
        self._screen.say(message, level)

    @contextmanager
    def job(self, description: str, total: float | None, unit: str = "batches") -> Iterator[Job]:
        """A job within the run (evaluating, saving): a second bar that goes away when it ends."""
        job = Job(description, total, unit, 0, self._clock)
        stop = self._screen.watch(job)
        try:
            yield job
        finally:
            stop()


@contextmanager
def progress(
    description: str,
    total: float | None,
    unit: str = "items",
    file: TextIO | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Job]:
    """Progress of any long job with rate and remaining time; `total` None if unknown. Unit "B" shows k, M, G.

    Yields a Job to `advance` or `set`. A line with amount and duration stays when the job ends without an error.
    """
    screen = _screen(file, clock)
    job = Job(description, total, unit, 0, clock)
    began = clock()
    try:
        stop = screen.watch(job)
        yield job
        stop()
        seconds = clock() - began
        rate = f" ({compact(job.done / seconds)} {unit}/s)" if seconds > 0.05 and job.done else ""
        screen.say(f"{job.description}: {job.counts()} in {duration(seconds)}{rate}")
    finally:
        screen.close()


def _screen(file: TextIO | None, clock: Clock) -> Screen:
    if file is None:
        if not _shown.get():
            return Hidden()
        if _in_notebook():
            return NotebookBars(clock)
        file = sys.stderr
    file = BestEffortStream(file)
    # Asked of the file itself: rich would take FORCE_COLOR for a terminal and draw bars into a log.
    interactive = file.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")
    return Bars(file) if interactive else PlainLines(file, clock)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"
