"""The bar on a terminal, plain lines elsewhere, nothing on stdout."""

import io
import os
import pty
import subprocess
import sys

import pytest

from pangu_sigma.monitor import TrainingProgress, progress
from pangu_sigma.monitor.printable_text import compact, duration

TRAINING = """
import sys, time
from pangu_sigma.monitor import TrainingProgress
with TrainingProgress(40, start_step=10) as bar:
    for step in range(11, 41):
        time.sleep(0.01)
        bar.update(step, 5.0 / step, 1234.0)
        if step == 20:
            bar.say("step 20 validation: code 2.000, [bold]docs[/bold] \\x1b[31m3.000")
        if step == 30:
            with bar.job("evaluating", 4) as job:
                for _ in range(4):
                    job.advance()
print("result")
"""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.getcwd(), **more}


@pytest.mark.parametrize("force", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_plain_lines_without_control_characters(force):
    run = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, check=True, env=environment(**force))
    assert run.stdout == b"result\n"
    text = run.stderr.decode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "step 20 validation: code 2.000, [bold]docs[/bold] �[31m3.000\n" in text
    assert text.splitlines()[-1].startswith("training: 40/40 steps (100 %), loss 0.1250, 1.2k tokens/s")


def test_a_terminal_gets_one_bar_and_stdout_only_the_result():
    leader, follower = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", TRAINING],
        stdout=subprocess.PIPE,
        stderr=follower,
        env=environment(TERM="xterm-256color", COLUMNS="100"),
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            seen += os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
    assert run.communicate()[0] == b"result\n" and run.returncode == 0
    text = seen.decode()
    assert "\x1b[" in text and "━" in text
    assert "[bold]docs[/bold] �[31m3.000" in text
    last = text.split("training")[-1]
    assert "40/40 steps" in last and "loss 0.1250, 1.2k tokens/s" in last
    assert "evaluating" not in last


def test_plain_lines_come_every_ten_seconds_and_say_what_is_left():
    file, clock = io.StringIO(), Clock()
    with TrainingProgress(1000, file=file, clock=clock) as bar:
        for step in range(1, 31):
            clock.now += 1
            bar.update(step, 3.0, 500)
    lines = file.getvalue().splitlines()
    assert lines[0] == "training: 10/1,000 steps (1 %), loss 3.0000, 500 tokens/s, 16:30 left"
    assert len(lines) == 3


def test_the_first_step_with_its_compilation_does_not_spoil_the_remaining_time():
    file, clock = io.StringIO(), Clock()
    with TrainingProgress(100, file=file, clock=clock) as bar:
        clock.now += 300
        bar.update(1, 3.0, 5)
        for step in range(2, 12):
            clock.now += 1
            bar.update(step, 3.0, 500)
    assert file.getvalue().splitlines()[-1].endswith(", 1:29 left")


def test_long_jobs_print_seldom_and_quick_steps_at_most_once_a_second():
    file, clock = io.StringIO(), Clock()
    with progress("tokenising", 10**9, file=file, clock=clock) as job:
        for _ in range(100_000):
            clock.now += 1
            job.advance()
    assert len(file.getvalue().splitlines()) < 100_000 / 50
    file = io.StringIO()
    with progress("saving", 1000, file=file, clock=clock) as job:
        for _ in range(1000):
            clock.now += 0.002
            job.advance()
    assert len(file.getvalue().splitlines()) <= 3


def test_a_job_ends_with_amount_duration_and_rate():
    file, clock = io.StringIO(), Clock()
    with progress("saving\x07 checkpoint", 3_000_000, unit="B", file=file, clock=clock) as job:
        clock.now += 2
        job.set(3_000_000)
    assert file.getvalue().splitlines()[-1] == "saving� checkpoint: 3.0M/3.0M B in 2.0 s (1.5M B/s)"


def test_a_job_of_unknown_length_and_an_empty_one():
    file, clock = io.StringIO(), Clock()
    with progress("reading", None, unit="documents", file=file, clock=clock) as job:
        clock.now += 20
        job.advance(40)
    assert file.getvalue().splitlines()[0] == "reading: 40 documents, 2 documents/s"
    file = io.StringIO()
    with progress("reading", 0, file=file, clock=clock):
        pass
    assert file.getvalue() == "reading: 0/0 items in 0.0 s\n"


def test_a_failed_job_claims_no_success_and_hands_the_error_on():
    file = io.StringIO()
    with pytest.raises(RuntimeError), progress("saving", 10, file=file):
        raise RuntimeError
    assert file.getvalue() == ""


def test_short_numbers():
    assert [compact(v) for v in (0, 7, 1.234, 950, 999.99, 1234, 34.5e6, 2e12)] == [
        "0", "7", "1.23", "950", "1.0k", "1.2k", "34.5M", "2.0T",
    ]  # fmt: skip
    assert [duration(v) for v in (4.2, 59.97, 187, 7509, 3 * 86400 + 4 * 3600 + 600)] == [
        "4.2 s", "1:00", "3:07", "2:05:09", "3 d 04:10",
    ]  # fmt: skip
