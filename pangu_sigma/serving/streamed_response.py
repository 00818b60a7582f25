"""An answer on its way to the client: whole or streamed, and given up the moment the client leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pangu_sigma.serving.api_errors import ApiError
from pangu_sigma.serving.openai_adapter import Work
from pangu_sigma.serving.response_bodies import Piece, Whole
from pangu_sigma.serving.scheduler import Scheduler, Ticket
from pangu_sigma.serving.server_metrics import Metrics

# Seconds between two comments of a stream that has nothing to say, so that nobody on the way takes it for dead.
HEARTBEAT = 15.0


class Answer(Response):
    """Submits the work when it is called, so that no way out of it can leave a request in the engine."""

    def __init__(self, work: Work, scheduler: Scheduler, metrics: Metrics) -> None:
        super().__init__()
        self._work = work
        self._scheduler = scheduler
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            ticket = self._scheduler.submit(self._work.requests)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        talk = asyncio.create_task(self._talk(ticket, scope, receive, send))
        leaves = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({talk, leaves}, return_when=asyncio.FIRST_COMPLETED)
            if talk.done():
                talk.result()
            else:
                self._metrics.left.inc()
        finally:
            ticket.close()
            talk.cancel()
            leaves.cancel()
            await asyncio.gather(talk, leaves, return_exceptions=True)

    async def _talk(self, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await ticket.accepted()
            self._metrics.prompt_tokens.labels(self._work.domain).inc(self._work.usage.prompt)
            if self._work.stream:
                await self._stream(ticket, send)
                return
            wholes = [Whole() for _ in self._work.choices]
            while ticket.more:
                for index, piece in await self._pieces(ticket):
                    wholes[index].add(piece)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = json.dumps(self._work.form.whole(wholes, self._work.usage), ensure_ascii=False, allow_nan=False)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _pieces(self, ticket: Ticket) -> list[tuple[int, Piece]]:
        events = await ticket.next()
        if self._work.usage.written == 0:
            self._metrics.first_token_seconds.observe(ticket.age)
        written = sum(event.token_id is not None for _, event in events)
        self._work.usage.written += written
        self._metrics.written_tokens.labels(self._work.domain).inc(written)
        return [(index, self._work.choices[index].add(event)) for index, event in events]

    async def _stream(self, ticket: Ticket, send: Send) -> None:
        """Server-sent events: a JSON object each, `[DONE]` at the end, an error object where it cannot go on."""
        form, usage, options = self._work.form, self._work.usage, self._work.options

        async def say(*payloads: dict[str, Any] | str) -> None:
            texts = (p if isinstance(p, str) else json.dumps(p, ensure_ascii=False, allow_nan=False) for p in payloads)
            body = "".join(f"data: {text}\n\n" for text in texts).encode("utf-8")
            await send({"type": "http.response.body", "body": body, "more_body": True})

        def chunk(body: dict[str, Any]) -> dict[str, Any]:
            if options.continuous_usage_stats:
                return {**body, "usage": usage.body()}
            return {**body, "usage": None} if options.include_usage else body

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        openings = [form.opening(index) for index in range(len(self._work.choices))]
        if any(openings):
            await say(*(chunk(opening) for opening in openings))
        try:
            while ticket.more:
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        pieces = await self._pieces(ticket)
                except TimeoutError:
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                    continue
                # A token whose text is still held back says nothing, unless its log-probability does.
                worth = [(i, p) for i, p in pieces if p.text or p.logprobs or p.finish]
                if worth:
                    await say(*(chunk(form.chunk(index, piece)) for index, piece in worth))
            if options.include_usage:
                await say(form.closing(usage))
            await say("[DONE]")
        except ApiError as error:
            await say(error.body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
