"""A server with one slot, a queue of two and a token: who gets in, how much may be sent, what leaving clients free."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from tests.pangu_sigma.serving.conftest import WINDOW
from tests.pangu_sigma.serving.server_process import Server
from tests.pangu_sigma.serving.test_openai_requests import refused

TOKEN = "rosebud"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
BODY_BYTES = 4096
SHORT = {"model": "law", "prompt": "the court", "max_tokens": 2}
# A long answer: no end-of-document token cuts it, since the penalty makes the likeliest text go on.
LONG = {"model": "law", "prompt": "the court", "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def strict(served_run, tmp_path_factory) -> Iterator[Server]:
    options = ["--slots", 1, "--queue", 2, "--max-tokens", 60, "--max-body", BODY_BYTES, "--domain", "law"]
    server = Server(served_run, tmp_path_factory.mktemp("strict"), *options, environment={"PANGU_SIGMA_TOKEN": TOKEN})
    yield server
    assert server.stop() == 0, server.stderr_text()


@pytest.fixture
def client(strict) -> Iterator[httpx.Client]:
    with strict.client(headers=RIGHT) as client:
        yield client


def begun(strict: Server, stack: ExitStack, count: int = 1) -> list[httpx.Response]:
    """Streams under way, the first of which holds the slot; they last until the stack is closed."""
    streams = []
    for _ in range(count):
        # Answers of many small pieces to a client that does not read: they are not over before it leaves.
        client = stack.enter_context(strict.client(headers=RIGHT))
        streams.append(stack.enter_context(client.stream("POST", "/v1/completions", json={**LONG, "stream": True})))
        assert streams[-1].status_code == 200
    return streams


@pytest.mark.parametrize("header", [None, "Bearer rosebu", "Bearer", "Basic rosebud", "rosebud", "Bearer ros\u00e9bud"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/tokenizer_info", "/nothing"])
def test_without_the_token_nothing_is_told(strict, path, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with strict.client() as client:
        response = client.get(path, headers=headers)
        refused(response, 401, "Authorization", code="invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_with_the_token_any_host_name_will_do(client):
    assert client.get("/v1/models", headers={"Host": "models.example"}).status_code == 200


def test_only_the_chosen_domain_is_offered(client, strict):
    assert strict.domains == ["law"]
    refused(client.post("/v1/completions", json={**SHORT, "model": "code"}), 404, param="model", code="model_not_found")


@pytest.mark.parametrize("size", [BODY_BYTES + 1, 3 * BODY_BYTES, 100 * BODY_BYTES])
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_a_large_body_is_refused(client, size, chunked):
    content = b" " * size
    try:
        response = client.post(
            "/v1/completions",
            content=iter([content[start : start + 1000] for start in range(0, size, 1000)]) if chunked else content,
            headers={"Content-Type": "application/json"},
        )
    except (httpx.WriteError, httpx.ReadError):
        assert size == 100 * BODY_BYTES  # far beyond, the connection may be cut while the client still sends
    else:
        refused(response, 413, str(BODY_BYTES), code="body_too_large")
    assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_max_tokens_is_bounded(client):
    refused(client.post("/v1/completions", json={**SHORT, "max_tokens": 61}), 400, "60 at most", param="max_tokens")
    messages = [{"role": "user", "content": "x"}]
    answer = client.post("/v1/chat/completions", json={"model": "law", "messages": messages, "temperature": 2.0})
    assert answer.json()["usage"]["completion_tokens"] <= 60 < WINDOW


def test_one_request_asks_for_no_more_than_there_is_room(client):
    refused(client.post("/v1/completions", json={**SHORT, "n": 4}), 400, "3 answers", param="n")
    assert client.post("/v1/completions", json={**SHORT, "n": 3}).status_code == 200


def test_a_full_queue_says_when_to_come_back(client):
    """Six at once, room for three: whoever is not taken is told when to try again."""

    def ask(_) -> httpx.Response:
        with httpx.Client(base_url=client.base_url, headers=RIGHT, timeout=60) as own:
            return own.post("/v1/completions", json=LONG)

    for _ in range(20):
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        assert {answer.status_code for answer in answers} <= {200, 429}
        if rejected := [answer for answer in answers if answer.status_code == 429]:
            break
    else:
        pytest.fail("six clients at once never filled one slot and a queue of two")
    for answer in rejected:
        refused(answer, 429, "try again", code="queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert sum(answer.status_code == 200 for answer in answers) >= 3
    assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_a_client_that_leaves_frees_its_slot_and_its_place(strict, client):
    left = strict.gauge("pangu_sigma_disconnects_total", headers=RIGHT)
    for _ in range(10):
        with ExitStack() as stack:
            begun(strict, stack, 3)
        strict.wait_for(active=0, waiting=0)
    assert client.post("/v1/completions", json=SHORT).status_code == 200
    # The answers are short: some are over before their client is gone, not all.
    assert strict.gauge("pangu_sigma_disconnects_total", headers=RIGHT) > left


def test_a_client_that_leaves_an_unstreamed_answer_frees_its_slot(strict, client):
    address = (client.base_url.host, client.base_url.port)
    body = json.dumps({**LONG, "n": 3}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.02)
    strict.wait_for(active=0, waiting=0)
    assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_half_a_body_holds_no_slot(strict, client):
    address = (client.base_url.host, client.base_url.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode())
        assert client.post("/v1/completions", json={**SHORT, "n": 3}).status_code == 200
