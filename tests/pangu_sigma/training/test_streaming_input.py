"""Real processes that learn from a stream while it grows: interrupted, killed, resumed at the exact byte."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from extract.extraction_plan import ExtractionPlan
from pangu_sigma.checkpoint import find_latest
from pangu_sigma.domains.list_domains import list_domains
from pangu_sigma.errors import INTERRUPTED
from tests.pangu_sigma.training.training_process import (
    assert_equal_checkpoints,
    assert_refused,
    checkpoint,
    command,
    started,
    wait_until,
)

STEPS = 80
CHANGES = [
    f"train.steps={STEPS}", "train.phases=[]", "data.max_domains_per_batch=null", "evaluate.every=0",
    "checkpoint.every=0", "checkpoint.every_seconds=0.05", "schedule={kind: constant}",
    "train.gradient_accumulation_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def lines(corpora) -> list[bytes]:
    """Documents of all domains in turn, each naming its own."""
    by_domain = [[(name, json.loads(line)["text"]) for line in (corpora / f"{name}.jsonl").open(encoding="utf-8")]
                 for name in ("code", "law", "poems")]  # fmt: skip
    return [
        json.dumps({"domain": name, "text": text}).encode() + b"\n"
        for together in zip(*by_domain, strict=True) for name, text in together
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(small_yaml, lines, tmp_path_factory) -> Path:
    """A run over the whole stream in one go, without checkpoints on its way."""
    folder = tmp_path_factory.mktemp("stream")
    (folder / "all.jsonl").write_bytes(b"".join(lines))
    changes = [*CHANGES, "checkpoint.every_seconds=null"]
    done = command("train", small_yaml, f"run.dir={folder / 'run'}", *changes, "--stream", "all.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    return folder / "run"


def last_step(run: Path) -> int:
    latest, _ = find_latest(run)
    return 0 if latest is None else latest.step


def said_that(log: Path, what: str) -> Callable[[], bool]:
    return lambda: what in log.read_text()


def test_a_growing_file_is_learned_as_it_grows_and_resumed_at_the_exact_byte(
    small_yaml, lines, uninterrupted, tmp_path
):
    run, source = tmp_path / "run", tmp_path / "grows.jsonl"
    content = b"".join(lines)
    # Six documents and a piece of the seventh.
    first = len(b"".join(lines[:6])) + 11
    source.write_bytes(content[:first])
    arguments = ["train", small_yaml, f"run.dir={run}", *CHANGES, "--stream", "grows.jsonl"]

    log = tmp_path / "idle.txt"
    process = started(*arguments, cwd=tmp_path, log=log)
    try:
        assert wait_until(said_that(log, "waiting for documents"), process), log.read_text()
        learned = last_step(run)
        assert 0 < learned < STEPS  # the clock saved it, and nothing has ended
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == INTERRUPTED
    finally:
        process.kill()
    assert f"Ctrl-C: saved step {learned}; continue with --resume" in log.read_text()
    assert f"{source} is read to byte {first - 11}" in log.read_text()

    for index in range(2):
        log = tmp_path / f"killed-{index}.txt"
        process = started(*arguments, "--resume", cwd=tmp_path, log=log)
        before, offset = last_step(run), source.stat().st_size
        try:
            assert wait_until(said_that(log, "resumed from"), process), log.read_text()
            while last_step(run) < before + 2:
                assert process.poll() is None, log.read_text()
                # Slowly, and in pieces that end inside lines.
                with open(source, "ab") as stream:
                    stream.write(content[offset : offset + 20])
                offset += 20
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        assert before < last_step(run) < STEPS

    # A line that cannot be used: what was learned before it is saved, and the line is named.
    received = source.read_bytes()
    cut = received.rfind(b"\n") + 1
    source.write_bytes(received[:cut] + b"{broken\n")
    done = command(*arguments, "--resume", cwd=tmp_path)
    line_number = received.count(b"\n") + 1
    assert_refused(done, f"grows.jsonl:{line_number}: the line is not valid JSON")
    assert "the stream cannot be read on: saved step" in done.stderr

    source.write_bytes(content)
    done = command(*arguments, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal_checkpoints(checkpoint(uninterrupted, STEPS), checkpoint(run, STEPS))


@pytest.mark.slow
def test_standard_input_is_learned_and_a_killed_run_loses_no_byte_of_it(small_yaml, lines, uninterrupted, tmp_path):
    run, content = tmp_path / "run", b"".join(lines)
    arguments = ["train", small_yaml, f"run.dir={run}", *CHANGES, "--stream", "-"]
    log = tmp_path / "log.txt"
    process = started(*arguments, cwd=tmp_path, log=log, stdin=subprocess.PIPE)
    given = len(b"".join(lines[:30]))
    try:
        process.stdin.buffer.write(content[:given])
        process.stdin.buffer.flush()
        kept = run / "stream" / "received.jsonl"
        assert wait_until(lambda: last_step(run) > 0 and kept.stat().st_size == given, process), log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
    assert 0 < last_step(run) < STEPS
    done = command(*arguments, "--resume", cwd=tmp_path, input=content[given:].decode())
    assert done.returncode == 0, done.stderr
    assert_equal_checkpoints(checkpoint(uninterrupted, STEPS), checkpoint(run, STEPS))
    # What a pipe gave after the last step is there for the next resume, and an input that ends ends the run.
    more = [*arguments, "train.steps=4000", "--resume"]
    done = command(*more, cwd=tmp_path, input="")
    assert done.returncode == 0 and "the stream has ended: saved step" in done.stderr, done.stderr
    assert last_step(run) > STEPS


def test_a_run_of_a_stream_is_like_any_other(uninterrupted):
    parent, _ = find_latest(uninterrupted)
    facts = {fact.name: fact for fact in list_domains(uninterrupted)}
    assert sum(fact.tokens for fact in facts.values()) == 16 * 4 * STEPS and facts["law"].loss_kind == "train"
    # A domain that is cut out goes its own way, without the stream.
    assert parent.state["sampler"]["kind"] == "stream" and ExtractionPlan(parent, ["law"]).config.data.stream is None


REFUSED = {
    "empty file": (["--stream", "empty.jsonl"], "empty.jsonl is empty: append a document to it"),
    "no file": (["--stream", "none.jsonl"], "none.jsonl does not exist"),
    "folder": (["--stream", "."], "is no file: name a .jsonl file"),
    "empty input": (["--stream", "-"], "the stream on standard input is empty"),
    "unknown domain": (["--stream", "one.jsonl", "--domain", "medicine"], "names the domain medicine"),
    "domain of nothing": (["--domain", "code"], "add --stream SOURCE"),
    "both": (["--stream", "one.jsonl", "--domain", "code", "--domain-field", "d"], "exclude each other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stream_that_cannot_be_learned_from_is_one_sentence_and_nothing_on_disk(small_yaml, tmp_path, case):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    options, message = REFUSED[case]
    before = sorted(tmp_path.rglob("*"))
    done = command(
        "train", small_yaml, f"run.dir={tmp_path / 'run'}", *CHANGES, *options, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert_refused(done, message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_of_files_does_not_go_on_as_a_stream(copied_run, small_yaml, tmp_path):
    run = copied_run(8)
    (tmp_path / "one.jsonl").write_text('{"text": "a", "domain": "code"}\n')
    done = command(
        "train", small_yaml, f"run.dir={run}", "data.max_domains_per_batch=null", "--resume", "--stream", "one.jsonl",
        cwd=tmp_path,
    )  # fmt: skip
    assert_refused(done, "has learned from its domains' files so far: resume without data.stream", "run.init_from=")
