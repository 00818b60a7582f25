"""Under attack every answer is the one that is given alone, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pangu_sigma.checkpoint import resolve
from pangu_sigma.serving.server_settings import ServerLimits
from pangu_sigma.trained_model import stored_tokenizer
from tests.pangu_sigma.serving.conftest import WINDOW
from tests.pangu_sigma.serving.request_battery import RequestBattery
from tests.pangu_sigma.serving.server_process import Server
from tests.pangu_sigma.serving.toy_server import toy_server
from tests.pangu_sigma.training.training_process import trained_two_steps

LONG_WINDOW = 288  # a prompt is read in three blocks


def assert_nothing_left(server: Server) -> None:
    server.wait_for(active=0, waiting=0, seconds=60)
    assert "Traceback" not in server.stderr_text() and "Error " not in server.stderr_text()


def test_an_attacked_server_gives_every_answer_as_it_gives_it_alone(server):
    counts = RequestBattery(server.url, WINDOW, seed=1).run(valid=12, hostile=40, noise=15, left=10)
    assert counts.wrong == []
    assert_nothing_left(server)


def test_an_attacked_server_reads_prompts_of_many_blocks_as_it_reads_them_alone(served_run, caplog):
    tokenizer = stored_tokenizer(resolve(served_run))
    with toy_server(tokenizer, ServerLimits(slots=4, queue=400)) as (url, scheduler):
        counts = RequestBattery(url, 32, seed=2).run(valid=30, hostile=90, noise=30, left=30)
        assert counts.wrong == []
        deadline = time.monotonic() + 30
        while (scheduler.open, scheduler.active, scheduler.waiting) != (0, 0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


@pytest.fixture(scope="module")
def long_run(small_yaml, tmp_path_factory) -> Path:
    return trained_two_steps(small_yaml, tmp_path_factory.mktemp("long"), LONG_WINDOW)


@pytest.fixture(scope="module")
def long_server(long_run, tmp_path_factory) -> Iterator[Server]:
    server = Server(long_run, tmp_path_factory.mktemp("server"), "--queue", 400)
    yield server
    assert server.stop() == 0, server.stderr_text()


@pytest.fixture
def roomy_server(long_run, tmp_path) -> Iterator[Server]:
    """Takes prompts of 20,000 documents."""
    server = Server(long_run, tmp_path, "--queue", 400, "--max-prompt-tokens", 100_000)
    yield server
    assert server.stop() == 0, server.stderr_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(7))
def test_an_attacked_server_over_thousands_of_requests(long_server, seed):
    counts = RequestBattery(long_server.url, LONG_WINDOW, seed).run(valid=120, hostile=300, noise=100, left=80)
    print(counts)
    assert counts.wrong == []
    assert_nothing_left(long_server)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["law", "auto"])
def test_a_server_attacked_with_20000_documents_goes_on_and_drops_them_with_their_client(roomy_server, model):
    body = json.dumps({"model": model, "prompt": [2] * 20_000, "echo": True, "max_tokens": 0, "logprobs": 1}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    address = ("127.0.0.1", int(roomy_server.url.rsplit(":", 1)[1]))
    with contextlib.ExitStack() as stack, roomy_server.client() as client:
        for _ in range(3):
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(head.encode() + body)
        roomy_server.wait_for(active=3, waiting=0)
        began = time.monotonic()
        short = {"model": "law", "prompt": "the court", "max_tokens": 4}
        assert client.post("/v1/completions", json=short).status_code == 200
        assert time.monotonic() - began < 10
        roomy_server.wait_for(active=3, waiting=0)
    roomy_server.wait_for(active=0, waiting=0, seconds=10)
