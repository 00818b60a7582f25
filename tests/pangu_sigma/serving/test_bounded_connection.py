"""Clients that are slow on purpose: what they can hold, and for how long. A real uvicorn on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import pytest

from pangu_sigma.serving.bounded_connection import HEAD_BYTES
from pangu_sigma.serving.server import _Server
from pangu_sigma.serving.server_settings import ServerLimits

LIMITS = ServerLimits(head_seconds=0.5, stall_seconds=0.7)
HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
LARGE = 64 << 20  # more than the system holds for a connection


async def app(scope, receive, send) -> None:
    """/SECONDS answers after a while; /large sends more than anybody's buffers hold."""
    body = b"x" * LARGE if scope["path"] == "/large" else b"answer"
    with contextlib.suppress(ValueError):
        await asyncio.sleep(float(scope["path"][1:]))
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    for start in range(0, len(body), 1 << 20):
        last = start + (1 << 20) >= len(body)
        await send({"type": "http.response.body", "body": body[start : start + (1 << 20)], "more_body": not last})


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[_Server, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = _Server(app, LIMITS)
        running = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield server, listening.getsockname()[1]
        server.should_exit = True
        await asyncio.wait_for(running, 10)


def run(steps) -> None:
    async def connected() -> None:
        async with served() as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.wait_for(steps(server, reader, writer), 20)
            finally:
                writer.close()

    asyncio.run(connected())


async def ended(reader: asyncio.StreamReader) -> float:
    """Seconds until the server closes the connection."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    return time.monotonic() - began


async def ended_after_data(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionResetError):
        while await reader.read(4 << 20):
            pass


@pytest.mark.parametrize("sent", [b"", b"G", HEAD])
def test_a_head_that_does_not_come_closes_the_connection(sent):
    async def steps(server, reader, writer):
        writer.write(sent)
        assert 0.3 < await ended(reader) < 3
        while server.server_state.connections:
            await asyncio.sleep(0.01)

    run(steps)


def test_a_head_that_comes_byte_by_byte_gains_no_time():
    async def steps(server, reader, writer):
        closed = asyncio.ensure_future(ended(reader))
        with contextlib.suppress(ConnectionError):
            for byte in HEAD * 100:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
                if closed.done():
                    break
        assert 0.3 < await closed < 3

    run(steps)


def test_an_answer_may_take_its_time_and_the_next_head_is_bounded_again():
    async def steps(server, reader, writer):
        for _ in range(2):
            writer.write(b"GET /1.2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"answer")).startswith(b"HTTP/1.1 200")
        writer.write(HEAD)
        assert 0.3 < await ended(reader) < 3

    run(steps)


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_a_client_that_does_not_take_its_answer_is_cut(more):
    async def steps(server, reader, writer):
        writer.transport.pause_reading()
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n")
        began = time.monotonic()
        while not server.server_state.tasks:
            await asyncio.sleep(0.01)
        while server.server_state.connections or server.server_state.tasks:
            await asyncio.sleep(0.01)
        assert 0.5 < time.monotonic() - began < 5

    run(steps)


def test_a_client_that_reads_slowly_but_reads_gets_all():
    async def steps(server, reader, writer):
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        taken = 0
        while part := await reader.read(4 << 20):
            taken += len(part)
            await asyncio.sleep(0.001)
        assert taken > LARGE

    run(steps)


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_head_of_more_than_16_kib_is_refused_however_it_arrives(pieces):
    async def steps(server, reader, writer):
        for length, status in ((HEAD_BYTES, b"200"), (HEAD_BYTES + 1, b"400")):
            head = b"GET /0 HTTP/1.1\r\nHost: x\r\nX: "
            head += b"x" * (length - len(head) - 4) + b"\r\n\r\n"
            assert len(head) == length
            size = -(-length // pieces)
            for start in range(0, length, size):
                writer.write(head[start : start + size])
                await writer.drain()
                await asyncio.sleep(0.02)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 " + status)
            if status == b"200":
                await reader.readuntil(b"answer")
        await ended_after_data(reader)

    run(steps)


def test_what_is_no_http_in_the_middle_of_an_answer_ends_the_connection_without_a_traceback(caplog):
    async def steps(server, reader, writer):
        writer.write(b"POST /large HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"no number\r\n")
        await ended_after_data(reader)

    run(steps)
    assert not [record for record in caplog.records if record.exc_info]
