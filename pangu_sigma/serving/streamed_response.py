"""HTTP response of a completion: streamed as server-sent events or whole, and cancelled when the client disconnects.

The way of one request, and the thread that runs each stage:

1. event loop: `request_guard.RequestGuard` checks host, token and body, FastAPI the fields (`openai_requests`).
2. one of FastAPI's worker threads: `http_app` lets `openai_adapter.OpenAIAdapter` tokenise the prompt and make the
   engine's requests of it.
3. event loop: `OpenAIResponse` submits the requests to the scheduler, which admits all of them or none.
4. engine thread (`scheduler.Scheduler`): the engine prefills the prompt and decodes, one step for all texts together.
5. event loop: every step's events come back through a `RequestHandle`; a choice makes a chunk of each
   (`openai_responses`), which is sent at once or collected for a whole body.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pangu_sigma.serving.api_errors import ApiError, internal
from pangu_sigma.serving.openai_adapter import PreparedRequest
from pangu_sigma.serving.openai_responses import Answer, Chunk
from pangu_sigma.serving.request_handle import RequestHandle
from pangu_sigma.serving.scheduler import Scheduler
from pangu_sigma.serving.server_metrics import ServerMetrics

# Seconds between two comments of a stream that has nothing to send, so that no proxy on the way takes it for dead.
HEARTBEAT = 15.0


class OpenAIResponse(Response):
    """Starlette response that submits its requests when it is called: no way out of it leaves one in the engine.

    All of it runs on the event loop.
    """

    def __init__(self, prepared: PreparedRequest, scheduler: Scheduler, metrics: ServerMetrics) -> None:
        super().__init__()
        self._prepared = prepared
        self._scheduler = scheduler
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            handle = self._scheduler.submit(self._prepared.requests)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        respond = asyncio.create_task(self._respond(handle, scope, receive, send))
        disconnect = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({respond, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if respond.done():
                respond.result()
            else:
                self._metrics.left.inc()
        finally:
            handle.close()
            respond.cancel()
            disconnect.cancel()
            await asyncio.gather(respond, disconnect, return_exceptions=True)

    async def _respond(self, handle: RequestHandle, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await handle.accepted()
            self._metrics.prompt_tokens.labels(self._prepared.domain).inc(self._prepared.usage.prompt)
            if self._prepared.stream:
                await self._stream(handle, send)
                return
            answers = [Answer() for _ in self._prepared.choices]
            while handle.has_more:
                for index, chunk in await self._next_chunks(handle):
                    answers[index].add(chunk)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = self._prepared.response_format.full_body(answers, self._prepared.usage)
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
        await Response(text, media_type="application/json")(scope, receive, send)

    async def _next_chunks(self, handle: RequestHandle) -> list[tuple[int, Chunk]]:
        events = await handle.next_events()
        if self._prepared.usage.written == 0:
            self._metrics.first_token_seconds.observe(handle.age)
        written = sum(event.token_id is not None for _, event in events)
        self._prepared.usage.written += written
        self._metrics.written_tokens.labels(self._prepared.domain).inc(written)
        return [(index, self._prepared.choices[index].add(event)) for index, event in events]

    async def _stream(self, handle: RequestHandle, send: Send) -> None:
        """Server-sent events: a JSON object each, `[DONE]` at the end, an error object where it cannot go on."""
        response_format, usage, options = self._prepared.response_format, self._prepared.usage, self._prepared.options

        async def send_events(*payloads: dict[str, Any] | str) -> None:
            texts = (p if isinstance(p, str) else json.dumps(p, ensure_ascii=False, allow_nan=False) for p in payloads)
            body = "".join(f"data: {text}\n\n" for text in texts).encode("utf-8")
            await send({"type": "http.response.body", "body": body, "more_body": True})

        def with_usage(body: dict[str, Any]) -> dict[str, Any]:
            if options.continuous_usage_stats:
                return {**body, "usage": usage.body()}
            return {**body, "usage": None} if options.include_usage else body

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        openings = [response_format.opening_body(index) for index in range(len(self._prepared.choices))]
        if any(openings):
            await send_events(*(with_usage(opening) for opening in openings))
        try:
            while handle.has_more:
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        chunks = await self._next_chunks(handle)
                except TimeoutError:
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                    continue
                # A token whose text is still held back needs no event, unless its log-probability was asked for.
                to_send = [(index, chunk) for index, chunk in chunks if chunk.text or chunk.logprobs or chunk.finish]
                if to_send:
                    bodies = (response_format.chunk_body(index, chunk) for index, chunk in to_send)
                    await send_events(*(with_usage(body) for body in bodies))
            if options.include_usage:
                await send_events(response_format.usage_body(usage))
            await send_events("[DONE]")
        except ApiError as error:
            await send_events(error.body())
        except Exception as error:
            await send_events(internal(error, f"a streamed answer of {self._prepared.domain}").body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
