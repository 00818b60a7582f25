"""Signals of a command line come to Python's handlers, whatever handlers C++ puts below them. No framework."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pangu_sigma.errors import INTERRUPTED, STOPPED
from parallel.comm.stop_signals import STOP_SIGNALS

ROOT = Path(__file__).parents[2]
# What MindSpore does to Ctrl-C: another handler in C, of which Python knows nothing.
OVERRULED = "import ctypes; ctypes.CDLL(None).signal(signal.SIGINT, 1)"
PROGRAM = """
import os, signal, sys, threading, time
from pangu_sigma.signals import StopSignalListener, StoppedBySignal, stop_signals_raise, take_signals_in_a_thread
take_signals_in_a_thread()
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()  # takes no signal either
{overruled}
def ready():
    print("ready", flush=True)
{body}
"""
WAITS = """
try:
    with stop_signals_raise():
        ready()
        os.read(0, 1)
except KeyboardInterrupt as error:
    print(repr(error))
"""
COMPILES = """
api = {"__name__": "mindspore.common.api", "ready": ready, "time": time}
text = "def compile():; ready(); for _ in range(20): time.sleep(0.05)"
exec(text.replace("; ", "\\n    "), api)
try:
    with stop_signals_raise():
        api["compile"]()
        print("compiled")
        time.sleep(30)
except KeyboardInterrupt as error:
    print(repr(error))
"""
COMPUTES = """
framework = {"__name__": "mindspore.ops", "time": time}
# A real signal would end the sleep at once.
exec("def run(): print('ready', flush=True); time.sleep(1.5)", framework)
try:
    with stop_signals_raise():
        began = time.monotonic()
        framework["run"]()
except KeyboardInterrupt as error:
    print(repr(error), time.monotonic() - began >= 1)
"""
LISTENS = """
with stop_signals_raise(), StopSignalListener() as listener:
    ready()
    while not listener.stop_requested or os.path.exists(sys.argv[1]):
        time.sleep(0.01)
print(listener.signal_number.name)
"""
STUCK = """
with StopSignalListener():
    import ctypes
    lock, locks = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    ready()
    locks(lock)
    locks(lock)
"""


class Program:
    """A process of `PROGRAM` that is ready for signals."""

    def __init__(self, body: str, *words: object, **options) -> None:
        text = PROGRAM.format(body=body, overruled=OVERRULED)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it said since."""
        text = self.process.stdout.read()
        return self.process.wait(20), text


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_interrupts_whatever_the_program_waits_in(number):
    program = Program(WAITS)
    program.process.send_signal(number)
    expected = "KeyboardInterrupt()" if number == signal.SIGINT else f"StoppedBySignal({int(number)})"
    assert program.ended() == (0, f"{expected}\n")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_job_that_saves_hears_which_signal_came(number, tmp_path):
    program = Program(LISTENS, tmp_path / "none")
    program.process.send_signal(number)
    assert program.ended() == (0, f"{number.name}\n")


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT, signal.SIGINT], INTERRUPTED),
        ([signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM),
        ([signal.SIGHUP, signal.SIGINT], INTERRUPTED),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM),
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM], 0),
    ],
)
def test_only_who_insists_ends_a_job_that_saves(tmp_path, numbers, code):
    saving = tmp_path / "saving"
    saving.touch()
    program = Program(LISTENS, saving)
    for number in numbers[:-1]:
        program.process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            program.process.wait(0.3)
    program.process.send_signal(numbers[-1])
    if code == 0:
        with pytest.raises(subprocess.TimeoutExpired):
            program.process.wait(0.3)
        saving.unlink()
    assert program.ended()[0] == code


def test_a_second_signal_ends_a_program_that_hears_nothing():
    program = Program(STUCK)
    program.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(0.3)
    program.process.send_signal(signal.SIGTERM)
    assert program.ended()[0] == 128 + signal.SIGTERM


def test_a_signal_waits_for_mindspore_whose_compiler_takes_no_exception():
    program = Program(COMPILES)
    program.process.send_signal(signal.SIGINT)
    assert program.ended() == (0, "compiled\nKeyboardInterrupt()\n")


def test_no_real_signal_comes_to_a_thread_that_computes():
    program = Program(COMPUTES)
    time.sleep(0.4)  # between two bytecodes, before the call, a signal is handled at once
    program.process.send_signal(signal.SIGTERM)
    assert program.ended() == (0, f"StoppedBySignal({int(signal.SIGTERM)}) True\n")


def test_outside_of_any_job_a_signal_ends_it_with_its_sentence():
    program = Program("ready()\ntime.sleep(30)")
    program.process.send_signal(signal.SIGHUP)
    assert program.ended() == (STOPPED, "Stopped by SIGHUP.\n")


def test_what_was_ignored_at_the_start_stays_ignored(tmp_path):
    program = Program(
        LISTENS, tmp_path / "none", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    program.process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(0.3)
    program.process.send_signal(signal.SIGTERM)
    assert program.ended() == (0, "SIGTERM\n")
