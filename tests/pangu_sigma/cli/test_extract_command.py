"""`pangu-sigma extract` and `python -m extract` as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pangu_sigma.checkpoint import open_checkpoint
from pangu_sigma.errors import INTERRUPTED, STOPPED
from tests.extract.conftest import save_model

ROOT = Path(__file__).parents[3]


def command(*words: object, module: str = "pangu_sigma") -> list[str]:
    return [sys.executable, "-m", module, *(["extract"] if module == "pangu_sigma" else []), *map(str, words)]


def ran(*words: object, module: str = "pangu_sigma") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command(*words, module=module), capture_output=True, text=True, env=environment, timeout=300)


def refused(*words: object) -> str:
    done = ran(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_run_is_cut_verified_and_said(parent, tmp_path):
    done = ran(parent.parent.parent, "--domain", "poems", "--out", tmp_path / "poems")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'poems'}: poems, ")
    assert lines[1].startswith("Largest logit difference 0.0 over 2 probe sequences in batches that mix 3 domains; ")
    # What comes next is no result: it stands on stderr.
    assert f"The model is in {tmp_path}/poems. Next:" in done.stderr
    assert f"pangu-sigma train {tmp_path}/poems/config.yaml run.init_from={tmp_path}/poems run.dir=" in done.stderr
    open_checkpoint(tmp_path / "poems").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["poems"]
    # a second time into the same folder is a mistake
    assert "poems exists and is not empty" in refused(parent, "--domain", "law", "--out", tmp_path / "poems")


def test_both_ways_to_call_it_are_one(parent, tmp_path):
    for module in ("pangu_sigma", "extract"):
        out = tmp_path / module
        words = (parent, "--domain", "law", "--no-verify", "--max-shard-size", "8kB", "--json", "--out", out)
        done = ran(*words, module=module)
        result = json.loads(done.stdout)
        assert result["path"] == str(out) and result["verification"] is None and result["domains"] == ["law"]
    for path in (tmp_path / "extract").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "pangu_sigma" / path.relative_to(tmp_path / "extract")).read_bytes()


def test_a_dry_run_tells_every_size_and_writes_nothing(parent, tmp_path):
    assert json.loads(ran(parent, "--domain", "poems", "--dry-run", "--json").stdout)["domains"] == ["poems"]
    plan = json.loads(ran(parent, "--domain", "poems", "--out", tmp_path / "poems", "--dry-run", "--json").stdout)
    done = ran(parent, "--domain", "poems", "--out", tmp_path / "poems", "--dry-run")
    assert done.returncode == 0 and "nothing was written" in done.stdout and not list(tmp_path.iterdir())
    assert ran(parent, "--domain", "poems", "--out", tmp_path / "poems", "--no-verify").returncode == 0
    for file in plan["files"]:
        assert (tmp_path / "poems" / file["path"]).stat().st_size == file["bytes"]
        assert file["path"] in done.stdout


def test_domains_are_listed(parent):
    table, listed = ran(parent).stdout, json.loads(ran(parent, "--list", "--json").stdout)
    assert [entry["name"] for entry in listed] == ["code", "law", "poems"]
    assert listed[2]["experts"] == {"blocks.1": 3} and f"{listed[2]['parameters']:,}" in table


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--domain", "poem", "--dry-run"], "did you mean 'poems'?"),
        (["--domain", "poems"], "--out is missing"),
        (["--out", "somewhere"], "no domain to keep is given"),
        (["--domain", "law", "--dry-run", "--dtype", "int8"], "use float32, float16, bfloat16"),
        (["--domain", "law", "--dry-run", "--max-shard-size", "big"], "write it like 500MB"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(parent, words, sentence):
    assert sentence in refused(parent, *words)


@pytest.mark.parametrize(
    ("signal_number", "code", "sentence"),
    [(signal.SIGINT, INTERRUPTED, "Interrupted."), (signal.SIGTERM, STOPPED, "Stopped by SIGTERM.")],
)
def test_an_interruption_leaves_nothing(parent, tmp_path, signal_number, code, sentence):
    out = tmp_path / "law"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = command(parent, "--domain", "law", "--out", out)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".tmp-law-*/shared.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)  # the copy is done, the verification is under way
        process.send_signal(signal_number)
        stderr_text = process.stderr.read()
    assert process.returncode == code and sentence in stderr_text and "Traceback" not in stderr_text
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path):
    parent = save_model(tmp_path / "run")
    words = command(parent, "--domain", "law", "--out", tmp_path / "out" / "law")
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while not list(tmp_path.glob("out/.tmp-law-*/tokenizer")):
            assert process.poll() is None
        process.kill()
    assert not (tmp_path / "out" / "law").exists() and not list(tmp_path.rglob("out/**/manifest.json"))
    assert ran(parent, "--domain", "law", "--out", tmp_path / "out" / "law", "--no-verify").returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["law"]
