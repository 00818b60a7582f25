"""The server as a process: what it says, what it refuses to start with, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import time

import httpx
import pytest

from tests.pangu_sigma.serving.server_process import Server
from tests.pangu_sigma.training.training_process import assert_refused, command, started, wait_until

SLOW = {"model": "law", "prompt": "the court", "max_tokens": 80, "temperature": 0, "stream": True}


def half_a_body(server: Server) -> socket.socket:
    """A connection on which half of a request's body was sent."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=30)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    return connection


def test_the_line_names_domains_address_and_page(server):
    assert server.line == (
        f"Serving code, law, poems, auto of {server.model} at {server.url}/v1 (page: {server.url}/), 8 at a time, "
        "window 96 tokens\n"
    )
    assert server.url.startswith("http://127.0.0.1:")
    loading, compiled = server.stderr_text().splitlines()[:: len(server.stderr_text().splitlines()) - 1]
    # Prompts of 16, 32, 64 and 96 tokens, each with and without scores; 1, 2, 4 and 8 texts together.
    assert loading == f"Loading {server.model} …" and compiled.startswith("compile: 12/12 graphs in ")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--domain", "lwa"], ["no domain 'lwa'; did you mean 'law'?"]),
        (["--top", 4], ["--top 4 is more than the 3 domains"]),
        (["--top", 2, "--slots", 1], ["more than the 1 slots"]),
        (["--domain", "law", "--prior", "updating"], ["needs several domains"]),
        (["--prior", "cached"], ["give both, or neither"]),
        (["--token", ""], ["token is empty"]),
        (["--host", "no.such.host.invalid"], ["'no.such.host.invalid' is not known here"]),
        (["--host", "192.0.2.1"], ["cannot listen on 192.0.2.1:8000"]),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(served_run, tmp_path, options, parts):
    began = time.process_time()
    assert_refused(command("serve", served_run, *options, cwd=tmp_path), *parts)
    assert time.process_time() - began < 5


def test_a_busy_port_is_told(server, served_run, tmp_path):
    port = server.url.rsplit(":", 1)[1]
    done = command("serve", served_run, "--port", port, cwd=tmp_path)
    assert_refused(done, f"cannot listen on 127.0.0.1:{port}", "choose another port")
    assert "Loading" not in done.stderr


def test_a_missing_or_damaged_model_is_told(served_run, tmp_path, copied_served_run):
    assert_refused(command("serve", tmp_path / "nothing", cwd=tmp_path), "nothing does not exist")
    run = copied_served_run
    (tensors,) = run.glob("checkpoints/*/shared.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert_refused(command("serve", run, "--port", "0", cwd=tmp_path), "shared.safetensors")


def test_an_interruption_while_the_model_is_loaded(served_run, tmp_path):
    log = tmp_path / "log"
    for seconds in (0.2, 2.5):
        process = started("serve", served_run, "--port", 0, cwd=tmp_path, log=log)
        assert wait_until(lambda: "Loading" in log.read_text(encoding="utf-8"), process)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) in (130, 0)  # 0: it was ready already, and drained
        stderr = log.read_text(encoding="utf-8")
        assert "Traceback" not in stderr and (process.returncode == 0 or stderr.endswith("Interrupted.\n"))


def test_sigterm_finishes_what_runs_and_takes_nothing_new(served_run, tmp_path):
    server = Server(served_run, tmp_path, "--slots", 1, "--queue", 120)
    with server.client() as client, server.client() as other:
        # Answers one after the other: enough to do while the signal comes.
        body = {**SLOW, "n": 16, "temperature": 1.0, "seed": 1}
        with client.stream("POST", "/v1/completions", json=body) as response, half_a_body(server) as left:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while (health := other.get("/health")).status_code == 200:
                assert time.monotonic() < deadline
            assert health.json()["status"] == "draining"
            refused_late = other.post("/v1/completions", json={**SLOW, "stream": False})
            assert refused_late.status_code == 503 and refused_late.json()["error"]["code"] == "shutting_down"
            data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert left.recv(100).startswith(b"HTTP/1.1 503")
    ended = [c["finish_reason"] for chunk in data for c in chunk["choices"] if c["finish_reason"]]
    assert len(ended) == 16 and set(ended) <= {"stop", "length"}
    assert server.stop() == 0
    assert "Draining: " in server.stderr_text() and "Traceback" not in server.stderr_text()


def test_answers_that_outlast_the_grace_are_ended_with_an_error(served_run, tmp_path):
    server = Server(served_run, tmp_path, "--slots", 1, "--queue", 120, "--grace", "0.2")
    with server.client() as client:
        body = {**SLOW, "n": 64, "temperature": 1.0, "seed": 1}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            data = [line for line in lines if line]
    assert json.loads(data[-1][6:])["error"]["code"] == "shutting_down"
    assert "[DONE]" not in data[-1]
    assert server.stop() == 0
    assert "answers before they were whole" in server.stderr_text()


def test_a_second_signal_ends_at_once(served_run, tmp_path):
    server = Server(served_run, tmp_path, "--slots", 1, "--queue", 120, "--grace", "600")
    with server.client() as client:
        body = {**SLOW, "n": 64, "temperature": 1.0, "seed": 1}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=20) == 0


def test_beyond_loopback_without_a_token_is_warned_about(served_run, tmp_path):
    server = Server(served_run, tmp_path, "--host", "0.0.0.0")
    port = server.url.rsplit(":", 1)[1]
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Host": "elsewhere.example"}).status_code == 200
    assert "Warning: 0.0.0.0 can be reached from other machines and no token is set" in server.stderr_text()
    assert server.stop() == 0
