"""The guard before the application: host names, bodies that end in the middle, and faults of the application."""

from __future__ import annotations

import asyncio
import json

import pytest

from pangu_sigma.serving.request_guard import RequestGuard, _host_name
from pangu_sigma.serving.server_settings import ServerSettings


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"), ("LocalHost:8000", "localhost"), ("127.0.0.1:80", "127.0.0.1"), ("[::1]", "::1"),
        ("[::1]:8000", "::1"), ("localhost:", "localhost"), ("[::1]evil.com", ""), ("[::1]:80evil.com", ""),
        ("[::1]:80:80", ""), ("[::1", ""), ("::1", ""), ("x[::1]", ""), ("localhost:80.evil.com", ""),
        ("localhost:evil.com", ""), ("localhost:80:evil.com", ""), ("[localhost]", ""), ("", ""), ("[]", ""),
        ("localhost evil.com", ""), ("127.0.0.1:123456", ""), ("evil.com", "evil.com"),
    ],
)  # fmt: skip
def test_a_host_is_a_name_and_a_port_and_nothing_else(host, name):
    assert _host_name(host) == name


def answer(app, messages: list[dict], cancel: bool = False) -> tuple[int, dict]:
    """Status and error object for a POST whose body comes in these messages and then no more; the server ends soon."""

    async def run() -> tuple[int, dict]:
        closing, sent, left = asyncio.Event(), [], list(messages)

        async def receive() -> dict:
            if left:
                return left.pop(0)
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict) -> None:
            sent.append(message)

        guard = RequestGuard(app, ServerSettings(), closing, lambda path, status: None)
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        task = asyncio.ensure_future(guard(scope, receive, send))
        await asyncio.sleep(0.05)
        closing.set()
        if cancel:
            task.cancel()
        await asyncio.wait_for(task, 5)
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))["error"]

    return asyncio.run(run())


WHOLE = [{"type": "http.request", "body": b"{}", "more_body": False}]


def test_a_body_half_sent_when_the_server_ends_is_answered_at_once():
    async def app(scope, receive, send) -> None:
        raise AssertionError("it has no body yet")

    status, error = answer(app, [{"type": "http.request", "body": b"{", "more_body": True}])
    assert (status, error["code"]) == (503, "shutting_down")


def test_an_application_that_is_cancelled_because_the_server_ends_says_so():
    async def app(scope, receive, send) -> None:
        await asyncio.Event().wait()

    status, error = answer(app, WHOLE, cancel=True)
    assert (status, error["code"]) == (503, "shutting_down")


def test_a_fault_of_the_application_has_an_id_that_the_log_tells_more_about(caplog):
    async def app(scope, receive, send) -> None:
        raise LookupError("a secret")

    status, error = answer(app, WHOLE)
    assert (status, error["code"]) == (500, "internal_error") and "a secret" not in error["message"]
    (record,) = [record for record in caplog.records if error["message"].split()[-1] in record.getMessage()]
    assert "a secret" in caplog.text and record.exc_info
