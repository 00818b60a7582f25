"""HTTP connection with timeouts: uvicorn's protocol, bounded while a head arrives and while a client reads nothing."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pangu_sigma.serving.server_settings import ServerLimits

HEAD_BYTES = 16 << 10


class _BoundedHeads(h11.Connection):
    """HTTP/1.1 parser that refuses a head of more than `HEAD_BYTES`.

    h11 itself looks only at what is incomplete: a long head that arrives in one piece would pass.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES)

    def next_event(self) -> Any:
        """The next event. Raises h11.RemoteProtocolError."""
        before = 0 if self.their_state is h11.SEND_BODY else len(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request) and before - len(self.trailing_data[0]) > HEAD_BYTES:
            raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
        return event


class BoundedConnection(H11Protocol):
    """HTTP/1.1 connection that is closed when it takes too long, in either direction.

    Reading: the next request's head must be complete `limits.head_seconds` after the connection (or the head's first
    byte). Writing: the client must not leave what is ready for it untouched for `limits.stall_seconds`.

    Reading: a head has `HEAD_BYTES` at most, however it arrives. uvicorn itself bounds only the pause after an answer
    (five seconds); the body's time and bytes are bounded by `RequestGuard`.
    """

    def __init__(self, limits: ServerLimits, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn = _BoundedHeads()
        self._limits = limits
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the wait for the first head."""
        super().connection_made(transport)
        # No buffer beyond the system's: whatever cannot be handed to it at once is what the client does not take.
        transport.set_write_buffer_limits(high=0)
        self._bound_head()

    def data_received(self, data: bytes) -> None:
        """Take data in; end or begin the wait for a head."""
        super().data_received(data)
        self._bound_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; in the middle of an answer there is no place for that, and the connection ends."""
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
            return
        self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Cancel the timers."""
        self._cancel()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        """Begin the wait for a client that reads nothing."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._limits.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """End that wait."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _bound_head(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting and self._head is not None:
            self._head.cancel()
            self._head = None
        elif waiting and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self._limits.head_seconds, self.transport.abort)

    def _cancel(self) -> None:
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
