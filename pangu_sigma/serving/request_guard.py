"""Request guard: ASGI middleware that checks host, token and body size before the application sees a request."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pangu_sigma.serving.api_errors import ApiError, internal, shutting_down
from pangu_sigma.serving.server_settings import ServerLimits, ServerSettings

# What shows nothing of the model: the page asks for the token itself, and probes have none.
OPEN_PATHS = frozenset({"/", "/health", "/favicon.ico"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# A name or an address, in brackets if it has colons, and maybe a port; nothing before, between or behind.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]\s]+))(?::[0-9]{0,5})?")


class RequestGuard:
    """ASGI middleware that checks host, token and body of a request, then hands it on with the body already read.

    A body that is still arriving when `closing` is set is not waited for. Whatever the application raises is answered
    with an id that is in the log. `on_response(path, status)` is called for every answer. Runs on the event loop.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, closing: asyncio.Event, on_response: Callable[[str, int], None]
    ) -> None:
        self.app = app
        self.settings = settings
        self.closing = closing
        self.on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets here

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-store")
                self.on_response(scope["path"], message["status"])
            await send(message)

        try:
            await self._answer(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            # The server ends, and no longer waits for what this one still does.
            if not self.closing.is_set():
                raise
            error = shutting_down()
        except Exception as fault:
            error = internal(fault, f"{scope['method']} {scope['path'][:80]!r}")
        else:
            return
        if not started:
            await error.response()(scope, receive, send_with_headers)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        posted = _BoundedBody(headers, receive, self.settings.limits) if scope["method"] == "POST" else None
        try:
            self._check_host(headers)
            self._check_token(scope["path"], headers)
            body = await self._read(posted) if posted else None
        except ApiError as error:
            if posted and not self.closing.is_set():
                await posted.discard()
            await error.response()(scope, receive, send)
            return
        except _ClientLeft:
            return
        await self.app(scope, receive if body is None else _replay(body, receive), send)

    async def _read(self, posted: _BoundedBody) -> bytes:
        """The body. Raises ApiError, also when the server ends meanwhile."""
        reading = asyncio.ensure_future(posted.read())
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait({reading, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise shutting_down()
            return reading.result()
        finally:
            reading.cancel()
            closing.cancel()
            await asyncio.gather(reading, closing, return_exceptions=True)

    def _check_host(self, headers: Headers) -> None:
        """Without a token, a server on the loopback address answers only to the machine's own names: a page in the
        browser that lets its own host name point here (DNS rebinding) must not reach it.
        """
        if self.settings.token is not None or not self.settings.loopback:
            return
        name = _host_name(headers.get("host", ""))
        if name not in LOOPBACK_NAMES and name != self.settings.host:
            raise ApiError(
                403,
                "this server answers to localhost only; to serve it under another name, start it with a token",
                code="host_not_allowed",
            )

    def _check_token(self, path: str, headers: Headers) -> None:
        if self.settings.token is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Headers are Latin-1; compare_digest takes bytes of any kind.
        matches = secrets.compare_digest(given.strip().encode("latin-1"), self.settings.token.encode("utf-8"))
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                401,
                "a valid token is needed: send Authorization: Bearer TOKEN (api_key in OpenAI's client)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _BoundedBody:
    """Request body, read within bounds on its bytes and its time."""

    # How much of a refused body is still taken in. A client that is sending gets to read its answer only after that;
    # beyond, the connection is cut.
    DISCARDED = 8

    def __init__(self, headers: Headers, receive: Receive, limits: ServerLimits) -> None:
        self._headers = headers
        self._receive = receive
        self._limits = limits
        self._received = 0
        self._complete = False

    async def read(self) -> bytes:
        """All of it. Raises ApiError where it is too large, too slow, or not declared as JSON."""
        max_bytes, seconds = self._limits.body_bytes, self._limits.body_seconds
        declared = self._headers.get("content-length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            raise self._too_large()
        # A page of another origin can send text/plain without asking first; JSON it cannot (there is no CORS here).
        if self._headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                while not self._complete:
                    parts.append(await self._next())
                    if self._received > max_bytes:
                        raise self._too_large()
        except TimeoutError:
            self._complete = True  # no more of it is waited for
            raise ApiError(
                408, f"the body did not arrive within {seconds:g} s", code="timeout", headers={"Connection": "close"}
            ) from None
        return b"".join(parts)

    async def discard(self) -> None:
        """Take in what a client still sends, within bounds, so that it comes to read why it was refused."""
        if "expect" in self._headers:  # it waits for a word before it sends
            return
        with contextlib.suppress(TimeoutError, _ClientLeft):
            async with asyncio.timeout(self._limits.body_seconds):
                while not self._complete and self._received <= self.DISCARDED * self._limits.body_bytes:
                    await self._next()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        part = message.get("body", b"")
        self._received += len(part)
        self._complete = not message.get("more_body", False)
        return part

    def _too_large(self) -> ApiError:
        most = self._limits.body_bytes
        # Closed, so that what was not taken in is never read as another request.
        closed = {"Connection": "close"}
        return ApiError(413, f"the body is larger than {most} bytes; send less", code="body_too_large", headers=closed)


class _ClientLeft(Exception):
    """The connection ended before the body was whole: there is nobody to answer."""


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()  # from now on: the client's leaving
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _host_name(host: str) -> str:
    """`[::1]:8000` -> `::1`, `localhost:8000` -> `localhost`; nothing for what is no host."""
    match = _HOST.fullmatch(host.strip())
    return (match[1] or match[2]).lower() if match else ""
