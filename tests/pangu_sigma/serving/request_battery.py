"""Attack on a running server: valid requests in a crowd of hostile ones and of clients that leave in the middle.

Every valid request has a seed of its own and is asked alone first; in the crowd it must get the same answer to the last
bit. A hostile one must be refused with a client's error, and none may cost the server more than that.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = ["the", "court", "shall", "find", "def", "return", "a", "rose", "is", "red", "import", "agreement", "naïve"]
# A few that are fine in a JSON text and in no request.
NUMBERS = (1e-308, 5e-324, -5e-324, 1e308, -1, -1e-9, 1e-320, 2**63, -(2**63) - 1, 10**30, float("nan"), float("inf"),
           float("-inf"), True, False, "1", [], {}, [1], 0.5)  # fmt: skip
NUMERIC = ("temperature", "top_p", "top_k", "repetition_penalty", "n", "max_tokens", "seed", "logprobs", "best_of",
           "frequency_penalty", "presence_penalty", "logit_bias", "stop_token_ids", "echo", "stream")  # fmt: skip


@dataclass
class Counts:
    """What was sent, and what came of it."""

    valid: int = 0
    hostile: int = 0
    noise: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.valid} valid requests, {self.hostile} hostile ones, {self.noise} pieces of broken HTTP, "
            f"{self.left} clients that left: {len(self.wrong)} wrong"
        )


class RequestBattery:
    """Battery of requests, drawn from a seed, for the server at `url`."""

    def __init__(self, url: str, window: int, seed: int, workers: int = 12) -> None:
        self.url, self.window, self.workers = url, window, workers
        self.draw = random.Random(seed)
        with self._client() as client:
            self.models = [model["id"] for model in client.get("/v1/models").json()["data"]]
            info = client.get("/tokenizer_info").json()
            self.vocab = info["vocab_size"]
            self.eod = client.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"][0]

    def run(self, valid: int, hostile: int, noise: int, left: int) -> Counts:
        """Send so many of each, valid ones once alone and once in the crowd."""
        counts = Counts(valid, hostile, noise, left)
        requests = [self._valid() for _ in range(valid)]
        with self._client() as client:
            alone = [self._answer(client, *request) for request in requests]
        jobs: list[Callable[[httpx.Client], str | None]] = [
            partial(self._compared, request, expected) for request, expected in zip(requests, alone, strict=True)
        ]
        jobs += [partial(self._refused, *self._hostile()) for _ in range(hostile)]
        jobs += [partial(self._send, self._noise(), self.draw.random()) for _ in range(noise)]
        jobs += [partial(self._send, self._post(*self._valid(long=True)), self.draw.random()) for _ in range(left)]
        self.draw.shuffle(jobs)
        with self._client() as client, ThreadPoolExecutor(self.workers) as pool:
            counts.wrong = [wrong for wrong in pool.map(lambda job: job(client), jobs) if wrong]
        return counts

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=300.0, limits=httpx.Limits(max_connections=None))

    def _text(self, most: int) -> str:
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(0, most)))

    def _ids(self, most: int) -> list[int]:
        ids = [self.draw.randrange(3, self.vocab) for _ in range(self.draw.randint(1, most))]
        return [self.eod if self.draw.random() < 0.1 else token for token in ids]

    def _prompt(self) -> Any:
        most = self.window // 2
        forms: list[Callable[[], Any]] = [
            lambda: self._text(6), lambda: self._ids(most), lambda: [self._text(4) for _ in range(2)],
            lambda: [self._ids(most) for _ in range(2)], lambda: [self.eod] * self.draw.randint(1, 40),
        ]  # fmt: skip
        return self.draw.choice(forms)()

    def _valid(self, long: bool = False) -> tuple[str, dict[str, Any]]:
        draw = self.draw
        body: dict[str, Any] = {
            "model": draw.choice(self.models),
            "max_tokens": self.window // 3 if long else draw.randint(1, 12),
            "seed": draw.randrange(2**62),
            "temperature": draw.choice([0, 0.7, 1, 3.0, 100, 1e-9]),
            "n": draw.choice([1, 1, 2]),
            "stream": draw.random() < 0.5,
        }
        for name, values in {
            "top_k": [1, 40, 2**31 - 1], "top_p": [1e-9, 0.8, 1], "repetition_penalty": [0.01, 1.3, 100],
            "stop": ["e", ["zz", " a"]],
        }.items():  # fmt: skip
            if draw.random() < 0.3:
                body[name] = draw.choice(values)
        if draw.random() < 0.3:
            count = draw.choice([0, 2, 20])
            if draw.random() < 0.5:
                return CHAT, {**body, "messages": self._messages(), "logprobs": True, "top_logprobs": count}
            body["logprobs"] = count
        if draw.random() < 0.25:
            return CHAT, {k: v for k, v in body.items() if k != "logprobs"} | {"messages": self._messages()}
        return COMPLETIONS, {**body, "prompt": self._prompt(), "echo": draw.random() < 0.4}

    def _messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._text(5)}]

    def _hostile(self) -> tuple[str, dict[str, Any]]:
        draw = self.draw
        path, body = self._valid()
        breakages: list[Callable[[], dict[str, Any]]] = [
            lambda: {draw.choice(NUMERIC): draw.choice(NUMBERS)},
            lambda: {"prompt": [self.vocab + draw.randrange(10**6)]},
            lambda: {"prompt": [self.eod] * 20_000, "echo": True, "max_tokens": 0},
            lambda: {"prompt": [[5] * (self.window + 1)] * draw.randint(1, 3)},
            lambda: {"model": draw.choice(["", "lwa", "\ud800", "x" * 5000])},
            lambda: {"max_tokens": self.window * 2},
            lambda: {"n": 10**9},
            lambda: {"stop": [""]},
            lambda: {"prompt": "\udc00"},
            lambda: {"temperatur": 1},
            lambda: {"logit_bias": {"5": draw.choice(NUMBERS[:13])}},
        ]
        return path, body | draw.choice(breakages)()

    def _noise(self) -> bytes:
        draw = self.draw
        whole = self._post(*self._valid())
        forms: list[Callable[[], bytes]] = [
            lambda: whole[: draw.randrange(1, len(whole))],
            lambda: draw.randbytes(draw.randint(1, 2000)),
            lambda: b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (20 << 10) + b"\r\n\r\n",
            lambda: whole.replace(b"Content-Length", b"Content-Length: 1\r\nContent-Length"),
            lambda: whole.replace(b"localhost", draw.choice([b"[::1]evil.com", b"localhost.evil.com", b"[::1", b""])),
            lambda: b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n" + whole,
        ]
        return draw.choice(forms)()

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    def _send(self, data: bytes, wait: float, client: httpx.Client) -> str | None:
        """Send bytes and leave: at once, or after some of the answer."""
        host, port = self.url.split("//")[1].split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(max(0.001, wait * 0.3))
            try:
                connection.sendall(data)
                answer = connection.recv(200)
            except (TimeoutError, ConnectionError):
                return None
        is_fault = answer.startswith(b"HTTP/1.1 5") and b" 503" not in answer[:12]
        return f"{data[:80]!r} got {answer[:80]!r}" if is_fault else None

    def _post_json(self, client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
        # ensure_ascii and NaN, which httpx would not send.
        return client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})

    def _refused(self, path: str, body: dict[str, Any], client: httpx.Client) -> str | None:
        response = self._post_json(client, path, body)
        fine = response.status_code == 200 or (400 <= response.status_code < 500 and "error" in response.json())
        if not fine or (response.status_code == 200 and '"error"' in response.text):
            return f"{json.dumps(body)[:300]} got {response.status_code}: {response.text[:300]}"
        return None

    def _compared(self, request: tuple[str, dict[str, Any]], expected: Any, client: httpx.Client) -> str | None:
        answer = self._answer(client, *request)
        if answer != expected:
            return f"{json.dumps(request)[:400]} got {answer}, and alone {expected}"
        return None

    def _answer(self, client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        """All that an answer says of each choice, however it came."""
        while (response := self._post_json(client, path, body)).status_code == 429:
            time.sleep(0.01)
        if response.status_code != 200:
            return response.status_code, response.text
        if not body["stream"]:
            return _joined([response.json()])
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        return _joined([json.loads(line) for line in lines if line != "[DONE]"]) if lines[-1] == "[DONE]" else lines


def _joined(bodies: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """index -> the choice, its parts put together."""
    choices: dict[int, dict[str, Any]] = {}
    for body in bodies:
        for choice in body["choices"]:
            own = choices.setdefault(choice["index"], {"text": "", "logprobs": {}, "finish": None, "domains": None})
            message = choice.get("message") or choice.get("delta") or {}
            own["text"] += choice.get("text", "") + (message.get("content") or "")
            for name, values in (choice["logprobs"] or {}).items():
                own["logprobs"].setdefault(name, []).extend(values)
            own["finish"] = choice["finish_reason"] or own["finish"]
            own["domains"] = choice.get("domains") or own["domains"]
    return choices
