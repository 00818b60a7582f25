"""The command line: instant help, one sentence for a mistake, codes that scripts can rely on."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pangu_sigma.cli import app

ROOT = Path(__file__).parents[3]
COMMANDS = [
    "init", "train", "mindformers", "config", "evaluate", "analyze", "sft", "dpo", "generate", "plan", "doctor",
    "extract", "export", "import", "upcycle", "domains", "vocab", "serve", "lifelong", "report", "corpora",
    "quickstart",
]  # fmt: skip
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pangu_sigma", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        **options,
    )


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "command",
    [
        [], *[[name] for name in COMMANDS], ["import", "pangu-alpha"], ["vocab", "extend"], ["domains", "add"],
        ["domains", "expand"], ["import", "mindformers"],
    ],  # fmt: skip
    ids=lambda command: " ".join(command) or "-",
)
def test_help_comes_at_once(command):
    # Processor time, not wall time, and the least of a few runs: the promise must not depend on what else the machine
    # does, and a process that shares its core with another one takes up to twice the time.
    seconds = []
    while not seconds or (min(seconds) >= 0.5 and len(seconds) < 5):
        before = children_seconds()
        done = run(*command, "--help")
        seconds.append(children_seconds() - before)
        assert done.returncode == 0 and done.stdout.startswith("Usage: pangu-sigma")
    assert min(seconds) < 0.5


def test_help_lists_every_command():
    printed = run("--help").stdout
    listed = [line.split()[0] for line in printed.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(COMMANDS)


def test_the_version_is_printed():
    assert run("--version").stdout.startswith("pangu-sigma 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", QUICKSTART, "model.hiden=3"],
        ["config", QUICKSTART, "train.steps=ten"],
        ["train", "no-such-file.yaml"],
        ["quickstart", "no-such-file.yaml"],
        ["config"],
        ["domains", "add", "runs/x", "--model", "runs/y", "--experts", "4"],
    ],
    ids=lambda arguments: " ".join(map(os.path.basename, arguments)),
)
def test_a_users_mistake_is_one_sentence_and_code_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_what_the_disk_answers_is_a_sentence_and_a_bug_keeps_its_traceback():
    commands = typer.Typer(cls=type(typer.main.get_command(app)))

    @commands.command()
    def write(error_number: int) -> None:
        raise OSError(error_number, os.strerror(error_number), "runs/x")

    @commands.command()
    def read() -> None: ...

    full = CliRunner().invoke(commands, ["write", str(errno.ENOSPC)])
    sentence = "Error: runs/x: No space left on device: free some space or name another place"
    assert full.exit_code == 2 and sentence in full.output
    assert isinstance(CliRunner().invoke(commands, ["write", str(errno.EBADF)]).exception, OSError)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", QUICKSTART, "--stream", "-", "--domain", "code"], "data.stream is read by one process"),
        (["evaluate", "runs/x", "--tasks", "questions.jsonl"], "--tasks runs in one process"),
        (["evaluate", "runs/x", "--domain", "auto"], "--domain auto runs in one process"),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(map(os.path.basename, part)),
)
def test_what_several_processes_do_not_do_is_refused(arguments, sentence, tmp_path):
    done = run(*arguments, "--workers", "2", cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr and "leave --workers out" in done.stderr


def test_the_quickstart_refuses_a_mesh(tmp_path):
    done = run("quickstart", QUICKSTART, "parallel={data: 2}", cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and "this job runs in one process: run it with" in done.stderr


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", QUICKSTART, "--resum"], ["generate", "x"]])
def test_a_wrong_call_is_code_2_without_a_traceback(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_config_prints_yaml_that_it_reads_again(tmp_path):
    first = run("config", QUICKSTART)
    (tmp_path / "again.yaml").write_text(first.stdout, encoding="utf-8")
    again = run("config", str(tmp_path / "again.yaml")).stdout
    plain = re.sub("  # (default|filled in)$", "", first.stdout, flags=re.M)
    # Every key stands in it, so nothing is left to be marked, but that the own cache of a run follows its folder.
    assert re.sub("(  cache: .*)  # filled in$", r"\1", again, flags=re.M) == plain != first.stdout


def test_config_prints_json_with_overrides():
    printed = json.loads(run("config", QUICKSTART, "--json", "domains.code.experts=9").stdout)
    assert printed["config"]["domains"][0]["experts"] == 9
    assert printed["parameters"]["total"] == printed["parameters"]["shared"] + sum(
        printed["parameters"]["per_domain"].values()
    )


def test_config_describes_every_key():
    assert "`train.stop_at`: Step after which the run ends early" in run("config", "--describe").stdout


def test_an_interruption_is_said_and_has_its_own_code(tmp_path):
    # A real SIGINT where a command surely waits: it reads its prompt from a pipe that stays empty.
    process = subprocess.Popen(
        [sys.executable, "-m", "pangu_sigma", "generate", str(tmp_path)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not Path(f"/proc/{process.pid}/syscall").read_text().startswith("0 0x0 "):  # read(0, …)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stderr == "Interrupted.\n"
