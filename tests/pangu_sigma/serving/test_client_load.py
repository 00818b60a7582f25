"""A hundred clients, a third of which die: no slot leaks, no survivor fails, and afterwards all is as before."""

from __future__ import annotations

import asyncio
import os
import time

import httpx
import pytest

from tests.pangu_sigma.serving.client_load import run_load

CLIENTS = 100


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def resident_bytes(process: int) -> int:
    with open(f"/proc/{process}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("seconds", [20, pytest.param(120, marks=pytest.mark.slow)])
def test_a_hundred_streams_some_of_which_die(server, seconds):
    url, process = httpx.URL(server.url), server.process.pid
    server.wait_for(active=0, waiting=0)
    asyncio.run(run_load(url.host, url.port, CLIENTS, 1.0, seed=9))  # what is opened and compiled once is there now
    server.wait_for(active=0, waiting=0)
    files, memory = open_files(process), resident_bytes(process)
    left = server.gauge("pangu_sigma_disconnects_total")

    outcome = asyncio.run(run_load(url.host, url.port, CLIENTS, seconds))

    assert outcome.failures == []
    assert outcome.done["whole"] >= CLIENTS and min(outcome.done.values()) >= 5, outcome.done
    server.wait_for(active=0, waiting=0)
    assert server.gauge("pangu_sigma_active_requests") == server.gauge("pangu_sigma_waiting_requests") == 0
    assert server.gauge("pangu_sigma_disconnects_total") > left  # some did die on a running request
    deadline = time.monotonic() + 10
    while open_files(process) > files + 3:  # connections of the dead
        assert time.monotonic() < deadline, f"{open_files(process)} open files, {files} before"
        time.sleep(0.1)
    assert resident_bytes(process) < memory + 200e6
    assert "Traceback" not in server.stderr_text()
    # All slots at once still answer.
    with server.client() as client:
        answer = client.post("/v1/completions", json={"model": "law", "prompt": "x", "n": 8, "max_tokens": 4})
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 8
    print(f"{CLIENTS} clients, {seconds} s: {outcome.tokens} tokens for survivors, {dict(outcome.done)}")
