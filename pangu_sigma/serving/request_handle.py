"""Handle of one HTTP request's texts in the engine: the event loop's end of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from pangu_sigma.generation import Event, Request
from pangu_sigma.serving.api_errors import ApiError, failed


class RequestHandle:
    """Handle of one HTTP request's engine requests (prompts × n texts): their events as they come. Close it in
    `finally`.

    Used on the event loop only; `release` is called once, when it is closed.
    """

    def __init__(self, requests: Sequence[Request], release: Callable[[RequestHandle], None]) -> None:
        self.requests = tuple(requests)
        self._release = release
        self._events: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._began = time.monotonic()
        self.unfinished = self._to_read = len(self.requests)
        self.closed = False

    async def accepted(self) -> None:
        """Wait until the engine has taken all requests. Raises ApiError if it refuses one (then it keeps none)."""
        await self._accepted

    @property
    def age(self) -> float:
        """Seconds since the requests were handed over."""
        return time.monotonic() - self._began

    @property
    def has_more(self) -> bool:
        """Whether events are still to come out of `next_events`."""
        return self._to_read > 0

    async def next_events(self) -> list[tuple[int, Event]]:
        """The (request index, event) that have come since the last call, at least one; cancelling it loses none.

        Raises ApiError where the engine failed or the server shuts down, or where this text cannot be continued (logits
        that are not finite).
        """
        items = [await self._events.get()]
        while not self._events.empty():
            items.append(self._events.get_nowait())
        for item in items:
            if isinstance(item, ApiError):
                raise item
            if item[1].error is not None:
                raise failed(item[1].error)
            self._to_read -= item[1].finish is not None
        return items

    def close(self) -> None:
        """Cancel the requests that still run. Closing twice is no error."""
        if not self.closed:
            self.closed = True
            self._release(self)

    def accept(self, error: ApiError | None) -> None:
        """Tell that the engine has taken all requests, or why it has not."""
        if not self._accepted.done():
            if error is None:
                self._accepted.set_result(None)
            else:
                self._accepted.set_exception(error)
                # Marks it retrieved: a client that left never reads it, and asyncio would log that.
                self._accepted.exception()

    def put(self, item: tuple[int, Event] | ApiError) -> None:
        """Add an event, or the error that ends all of them."""
        if not self.closed:
            self._events.put_nowait(item)
