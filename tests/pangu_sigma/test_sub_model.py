"""A domain that was cut out of a run does every job that the run does, with the same figures and the same text."""

from __future__ import annotations

import json

import pytest

from tests.pangu_sigma.serving.server_process import Server
from tests.pangu_sigma.training.training_process import command

GREEDY = {"prompt": "the court", "max_tokens": 6, "temperature": 0}
WORDS = ("--prompt", GREEDY["prompt"], "--max-tokens", GREEDY["max_tokens"], "--temperature", GREEDY["temperature"])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("sub_model")


def run(*words: object, cwd) -> str:
    done = command(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def law(finished_run, work):
    """The folder of the run's domain `law`."""
    run("extract", finished_run, "--domain", "law", "--out", work / "law", cwd=work)
    return work / "law"


def test_it_is_evaluated_with_the_runs_loss(law, finished_run, work):
    of_run, own = (json.loads(run("evaluate", model, "--json", cwd=work)) for model in (finished_run, law))
    assert own["matrix"] == {"law": {"law": of_run["matrix"]["law"]["law"]}}
    assert own["tokens"] == {"law": of_run["tokens"]["law"]}


def test_it_writes_and_serves_the_runs_text(law, finished_run, work):
    text = run("generate", finished_run, "--domain", "law", *WORDS, cwd=work)
    assert run("generate", law, *WORDS, cwd=work) == text
    server = Server(law, work, "--slots", 1, "--no-warm-up")
    with server.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["law"]
        answer = client.post("/v1/completions", json={"model": "law", **GREEDY}).json()
    assert GREEDY["prompt"] + answer["choices"][0]["text"] + "\n" == text
    assert server.stop() == 0


def test_it_trains_on_with_fresh_optimizer_state_and_says_so(law, work):
    small = ["train.steps=2", "train.phases=[]", "schedule.warmup_steps=1", "evaluate.every=0"]
    done = command("train", law / "config.yaml", f"run.init_from={law}", f"run.dir={work / 'on'}", *small, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "the optimizer's state starts fresh" in done.stderr
    assert run("extract", work / "on", "--list", cwd=work).count("law") >= 1
