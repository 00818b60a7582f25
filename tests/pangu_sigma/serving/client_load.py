"""Many clients at once, each doing one thing after the other until the time is over; some of them die."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

DOMAINS = ("code", "law", "poems")


@dataclass
class Outcome:
    """What the clients met. `failures` must stay empty; `done` counts what they did."""

    done: Counter = field(default_factory=Counter)
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


async def run_load(host: str, port: int, clients: int, seconds: float, seed: int = 0) -> Outcome:
    """`clients` at once for `seconds`; what is under way then is finished."""
    outcome = Outcome()
    until = time.monotonic() + seconds
    await asyncio.gather(*(_client(host, port, random.Random(seed * 1000 + i), until, outcome) for i in range(clients)))
    return outcome


async def _client(host: str, port: int, draw: random.Random, until: float, outcome: Outcome) -> None:
    while time.monotonic() < until:
        # Two of three read to the end; the others die: while waiting, in the middle, or before they have asked.
        kind = draw.choices(["whole", "leaves", "aborts", "never reads", "half a request"], [66, 10, 10, 10, 4])[0]
        body = {
            "model": draw.choice(DOMAINS),
            "prompt": "the court shall"[: draw.randrange(16)],
            "max_tokens": draw.randrange(1, 60),
            "temperature": draw.choice([0, 1]),
            "seed": draw.randrange(1 << 30),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            await asyncio.wait_for(_request(host, port, kind, body, draw, outcome), 120)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, AssertionError, ValueError) as error:
            outcome.failures.append(f"{kind}: {error!r}")
        outcome.done[kind] += 1


async def _request(host: str, port: int, kind: str, body: dict, draw: random.Random, outcome: Outcome) -> None:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, port)
    try:
        if kind == "half a request":
            writer.write(head.encode() + data[: len(data) // 2])
            await writer.drain()
            return
        writer.write(head.encode() + data)
        await writer.drain()
        if kind == "never reads":
            await asyncio.sleep(draw.random() * 0.2)
            return
        status = await reader.readline()
        assert b" 200 " in status, status
        if kind == "whole":
            _check(await reader.read(), body["max_tokens"], outcome)
            return
        for _ in range(draw.randrange(12)):
            await reader.readline()
        if kind == "aborts":
            writer.transport.abort()  # a reset instead of an orderly end
    finally:
        writer.close()


def _check(answer: bytes, most: int, outcome: Outcome) -> None:
    """A whole answer ends with a finish, a usage and [DONE]."""
    lines = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: ")]
    assert lines and lines[-1] == "[DONE]", lines[-1:]
    *pieces, last = [json.loads(line) for line in lines[:-1]]
    ends = [choice["finish_reason"] for piece in pieces for choice in piece["choices"] if choice["finish_reason"]]
    written = last["usage"]["completion_tokens"]
    assert ends in (["length"], ["stop"]) and 1 <= written <= most, (ends, written, most)
    assert ends == ["stop"] or written == most
    outcome.tokens += written
