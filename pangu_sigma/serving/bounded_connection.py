"""HTTP connection with timeouts: uvicorn's protocol, bounded while a head arrives and while a client reads nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pangu_sigma.serving.server_settings import ServerLimits


class BoundedConnection(H11Protocol):
    """HTTP/1.1 connection that is closed when it takes too long, in either direction.

    Reading: the next request's head must be complete `limits.head_seconds` after the connection (or the head's first
    byte). Writing: the client must not leave what is ready for it untouched for `limits.stall_seconds`.

    uvicorn itself bounds only the pause after an answer (five seconds) and the head's bytes; the body's time and bytes
    are bounded by `RequestGuard`.
    """

    def __init__(self, limits: ServerLimits, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
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
