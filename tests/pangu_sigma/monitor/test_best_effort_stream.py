"""Progress is shown where it can be, and ends no job where it cannot."""

import io
import sys

import pytest

from pangu_sigma.monitor import TrainingProgress, progress
from pangu_sigma.monitor.progress import report


class Broken(io.StringIO):
    """What a pipe without a reader, a terminal that closed or a full disk does."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def isatty(self) -> bool:
        return isinstance(self.error, BrokenPipeError)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Broken(BrokenPipeError(32, "pipe")), Broken(OSError(28, "full"))])
def test_a_stream_that_takes_nothing_ends_no_job(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    report("a message")
    with TrainingProgress(2) as bar:
        bar.update(1, 1.0, 1.0)
        bar.say("a message")
        with bar.job("save", 2, unit="B") as job:
            job.set(2)
        bar.update(2, 1.0, 1.0)
    with progress("copy", 1) as job:
        job.advance()
