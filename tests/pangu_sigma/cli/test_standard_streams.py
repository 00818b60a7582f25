"""Standard streams that nobody takes: a command whose result they are says so, where its reader did not just leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LONG = ["config", "--describe"]  # more than a pipe holds


def shell(redirected: str, *words: str) -> subprocess.CompletedProcess[str]:
    text = f"set -o pipefail; {sys.executable} -m pangu_sigma {' '.join(words)} {redirected}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("words", [LONG, ["--help"]])
def test_a_reader_that_leaves_ends_it_quietly(words):
    done = shell("| head -1", *words)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("redirected", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_output_that_is_lost_is_said(redirected, reason):
    done = shell(redirected, *LONG)
    sentence = f"Error: standard output could not be written ({reason}): name another place for it\n"
    assert (done.returncode, done.stderr) == (2, sentence)


def test_without_any_stream_files_get_no_number_of_a_stream(tmp_path):
    program = (
        "from pangu_sigma.cli.standard_streams import install_standard_streams; install_standard_streams()\n"
        "import sys; file = open('file', 'w'); print('lost'); print('lost too', file=sys.stderr); sys.stdin.read()\n"
        "file.write(str(file.fileno()))"
    )
    words = f"exec {sys.executable} -c \"$PROGRAM\" <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": program}
    assert subprocess.run(["bash", "-c", words], cwd=tmp_path, env=environment, timeout=60).returncode == 0
    assert int((tmp_path / "file").read_text()) > 2
