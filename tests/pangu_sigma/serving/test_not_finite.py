"""One domain's weights have diverged: its requests fail, each with an error that says so; all others are served."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.pangu_sigma.serving.server_process import Server
from tests.pangu_sigma.training.training_process import assert_refused, command

SAID = "the experts of law compute numbers that are not finite"
GREEDY = {"prompt": "the court", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def half_broken(broken_run, tmp_path_factory) -> Iterator[Server]:
    server = Server(broken_run, tmp_path_factory.mktemp("half_broken"), "--slots", 4, "--no-warm-up")
    yield server
    assert server.stop() == 0, server.stderr_text()


@pytest.fixture
def client(half_broken) -> Iterator[httpx.Client]:
    with half_broken.client() as client:
        yield client


def test_the_start_warns_of_the_domain_and_serves_the_others(half_broken):
    assert f"Warning: {SAID}" in half_broken.stderr_text() and half_broken.domains == ["code", "law", "poems", "auto"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_request_gets_an_error_object_that_clients_do_not_try_again(client, path):
    fields = {"prompt": "x"} if path.endswith("/v1/completions") else {"messages": [{"role": "user", "content": "x"}]}
    answer = client.post(path, json={"model": "law", **fields})
    assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert error["message"].startswith(SAID) and (error["type"], error["code"]) == ("server_error", "model_error")


def test_scores_of_a_prompt_that_are_no_numbers_are_an_error_too(client):
    fields = {"model": "law", "prompt": "the court", "echo": True, "logprobs": 1, "max_tokens": 0}
    assert client.post("/v1/completions", json=fields).json()["error"]["code"] == "model_error"


def test_a_stream_ends_with_the_error(client):
    with client.stream("POST", "/v1/completions", json={"model": "law", "stream": True, **GREEDY}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1])["error"]["message"].startswith(SAID) and "[DONE]" not in lines


def test_the_others_go_on_with_the_same_text_and_no_slot_is_lost(client, half_broken):
    alone = client.post("/v1/completions", json={"model": "code", **GREEDY}).json()["choices"][0]["text"]
    body = {"model": "code", "stream": True, "n": 3, **GREEDY}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        begun = next(lines)
        for _ in range(6):
            assert client.post("/v1/completions", json={"model": "law", "n": 2, **GREEDY}).status_code == 500
        chunks = [json.loads(line[6:]) for line in [begun, *lines] if line.startswith("data: {")]
    for index in range(3):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in choices) == alone and choices[-1]["finish_reason"]
    half_broken.wait_for(active=0, waiting=0)
    assert client.get("/health").status_code == 200
    assert half_broken.gauge('pangu_sigma_failed_total{domain="law"}') >= 6
    assert half_broken.gauge('pangu_sigma_failed_total{domain="code"}') == 0


def test_a_server_that_could_write_in_no_domain_does_not_start(broken_run, tmp_path):
    words = ("serve", broken_run, "--domain", "law", "--port", 0, "--no-warm-up", "--slots", 1)
    assert_refused(command(*words, cwd=tmp_path), SAID, "take an earlier checkpoint")


def test_the_command_line_says_it_in_a_sentence(broken_run, tmp_path):
    done = command("generate", broken_run, "--domain", "law", "--prompt", "the", cwd=tmp_path)
    assert_refused(done, SAID)
    assert done.stdout == "the\n"
    lines = "".join(json.dumps({"prompt": "the", "domain": name}) + "\n" for name in ("code", "law", "poems"))
    done = command("generate", broken_run, "--jsonl", "--max-tokens", 3, cwd=tmp_path, input=lines)
    assert_refused(done, "1 of 3 prompts failed; prompt 2: ", SAID)
    code, law, poems = map(json.loads, done.stdout.splitlines())
    assert law["finish"] == "error" and law["error"].startswith(SAID) and law["ids"] == []
    assert len(code["ids"]) == len(poems["ids"]) == 3 and "error" not in code
