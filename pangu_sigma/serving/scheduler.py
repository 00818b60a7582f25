"""The thread that owns model and engine, and the event loop's view of it.

MindSpore is used by one thread only. The event loop hands commands over in a queue; what the engine says comes back
through `call_soon_threadsafe`. All counting happens on the event loop, so that admission needs no locks; a slot counts
as free when the engine's thread has said so.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pangu_sigma.errors import UserError
from pangu_sigma.generation import Event, Request
from pangu_sigma.serving.api_errors import bad_request, busy, failed, internal, shutting_down
from pangu_sigma.serving.server_settings import Limits


class Engine(Protocol):
    """What the scheduler asks of `pangu_sigma.generation.engine.Engine`."""

    active: int
    waiting: int
    idle: bool

    def add(self, request: Request) -> int: ...

    def cancel(self, request_id: int) -> None: ...

    def step(self) -> list[Event]: ...


class Observer(Protocol):
    """What the scheduler tells the metrics."""

    def state(self, active: int, waiting: int) -> None: ...

    def stepped(self, seconds: float, tokens: int) -> None: ...

    def answered(self, seconds: float) -> None: ...

    def failed(self, domain: str) -> None: ...


class Ticket:
    """One HTTP request: its engine requests by index, and their events as they come. Close it whatever happens."""

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self._scheduler = scheduler
        self._events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
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
    def more(self) -> bool:
        """Whether events are still to come out of `next`."""
        return self._to_read > 0

    async def next(self) -> list[tuple[int, Event]]:
        """The (index, event) that have come since, at least one; cancelling it loses none.

        Raises ApiError if the server cannot go on, or the model not with this text.
        """
        said = [await self._events.get()]
        while not self._events.empty():
            said.append(self._events.get_nowait())
        for one in said:
            if isinstance(one, Exception):
                raise one
            if one[1].error is not None:
                raise failed(one[1].error)
            self._to_read -= one[1].finish is not None
        return said

    def close(self) -> None:
        """Give back what still runs. Closing twice is no error."""
        if not self.closed:
            self.closed = True
            self._scheduler._release(self)

    def _accept(self, error: Exception | None) -> None:
        if not self._accepted.done():
            if error is None:
                self._accepted.set_result(None)
            else:
                self._accepted.set_exception(error)
                self._accepted.exception()  # a client that left does not come to read it

    def _put(self, said: tuple[int, Event] | Exception) -> None:
        if not self.closed:
            self._events.put_nowait(said)


@dataclass(frozen=True)
class _Add:
    ticket: Ticket


@dataclass(frozen=True)
class _Cancel:
    ticket: Ticket


_STOP = None


class Scheduler:
    """Takes requests up to `limits.slots` + `limits.queue` and lets the engine's thread serve them together.

    `build` makes the engine, in that thread. `observer` hears what happens, on the event loop.
    """

    def __init__(self, build: Callable[[], Engine], limits: Limits, observer: Observer) -> None:
        self.limits = limits
        self.draining = False
        self.active = self.waiting = 0
        self._build = build
        self._observer = observer
        self._commands: queue.SimpleQueue[_Add | _Cancel | None] = queue.SimpleQueue()
        self._open = 0  # requests handed over whose end the engine's thread has not reported
        self._tickets: set[Ticket] = set()
        self._nothing_open = asyncio.Event()
        self._nothing_open.set()
        self._seconds = 1.0  # of an answer, smoothed

    async def start(self) -> Engine:
        """Build the engine and begin to serve; the engine is returned for its facts only. Raises what `build` raises.

        `failed` is a future that holds the exception if the engine's thread ends by one later.
        """
        self._loop = asyncio.get_running_loop()
        self._built: asyncio.Future[Engine] = self._loop.create_future()
        self.failed: asyncio.Future[BaseException] = self._loop.create_future()
        # A daemon: a step or a compilation under way must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        return await self._built

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Hand requests over, all or none. Raises ApiError: 429 when they do not fit now, 503 while draining."""
        if self.draining or self.failed.done():
            raise shutting_down()
        room = self.limits.slots + self.limits.queue
        if len(requests) > min(room, self.limits.choices):
            most = min(room, self.limits.choices)
            raise bad_request(f"one request may ask for {most} answers (prompts × n), not {len(requests)}", "n")
        if self._open + len(requests) > room:
            raise busy(self._retry_after())
        ticket = Ticket(self, requests)
        self._count(len(requests))
        self._tickets.add(ticket)
        self._commands.put(_Add(ticket))
        return ticket

    @property
    def open(self) -> int:
        """Requests that were taken and have not ended."""
        return self._open

    async def drain(self, seconds: float) -> bool:
        """Take nothing new and wait until what runs has finished; whether it has within `seconds`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._nothing_open.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def abandon(self) -> None:
        """End every answer under way with an error that says why."""
        for ticket in list(self._tickets):
            ticket._accept(shutting_down())
            ticket._put(shutting_down())

    async def stop(self, seconds: float = 5.0) -> None:
        """End the engine's thread after its current step."""
        self.draining = True
        self._commands.put(_STOP)
        await asyncio.to_thread(self._thread.join, seconds)

    # On the event loop.

    def _release(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)
        if ticket.unfinished:
            self._commands.put(_Cancel(ticket))

    def _count(self, change: int) -> None:
        self._open += change
        if self._open:
            self._nothing_open.clear()
        else:
            self._nothing_open.set()

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self._seconds * (self._open + 1) / self.limits.slots)))

    def _finished(self, ticket: Ticket, count: int = 1) -> None:
        ticket.unfinished -= count
        self._count(-count)

    def _took(self, ticket: Ticket, error: UserError | None) -> None:
        if error is not None:
            self._finished(ticket, ticket.unfinished)
        ticket._accept(None if error is None else bad_request(str(error)))

    def _said(self, events: list[tuple[Ticket, int, Event]], seconds: float) -> None:
        self._observer.stepped(seconds, sum(event.token_id is not None for _, _, event in events))
        for ticket, index, event in events:
            ticket._put((index, event))
            if event.error is not None:
                self._finished(ticket)
                self._observer.failed(ticket.requests[index].domain)
            elif event.finish is not None:
                self._finished(ticket)
                took = ticket.age
                self._seconds += 0.1 * (took - self._seconds)
                self._observer.answered(took)

    def _state(self, active: int, waiting: int) -> None:
        self.active, self.waiting = active, waiting
        self._observer.state(active, waiting)

    def _broke(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)
        for ticket in list(self._tickets):
            ticket._accept(internal())
            ticket._put(internal())

    # In the engine's thread.

    def _tell(self, method: Callable[..., None], *arguments: object) -> None:
        # The loop is closed only when the process ends without waiting for this thread.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(method, *arguments)

    def _work(self) -> None:
        try:
            engine = self._build()
        except BaseException as error:  # whatever it is, the main thread ends the process with it
            self._tell(self._settle, error)
            return
        self._tell(self._settle, engine)
        try:
            self._serve(engine)
        except BaseException as error:
            self._tell(self._broke, error)

    def _settle(self, result: Engine | BaseException) -> None:
        if self._built.cancelled():
            return
        if isinstance(result, BaseException):
            self._built.set_exception(result)
        else:
            self._built.set_result(result)

    def _serve(self, engine: Engine) -> None:
        owners: dict[int, tuple[Ticket, int]] = {}
        while True:
            while engine.idle or not self._commands.empty():
                command = self._commands.get()
                if command is _STOP:
                    return
                if isinstance(command, _Add):
                    self._add(engine, command.ticket, owners)
                else:
                    self._cancel(engine, command.ticket, owners)
                self._tell(self._state, engine.active, engine.waiting)
            began = time.perf_counter()
            events = engine.step()
            seconds = time.perf_counter() - began
            said = [(*owners[event.request_id], event) for event in events]
            for event in events:
                if event.finish is not None:
                    del owners[event.request_id]
            self._tell(self._state, engine.active, engine.waiting)
            self._tell(self._said, said, seconds)

    def _add(self, engine: Engine, ticket: Ticket, owners: dict[int, tuple[Ticket, int]]) -> None:
        numbers: list[int] = []
        try:
            for request in ticket.requests:
                numbers.append(engine.add(request))
        except UserError as error:
            for number in numbers:
                engine.cancel(number)
            self._tell(self._took, ticket, error)
            return
        owners.update({number: (ticket, index) for index, number in enumerate(numbers)})
        self._tell(self._took, ticket, None)

    def _cancel(self, engine: Engine, ticket: Ticket, owners: dict[int, tuple[Ticket, int]]) -> None:
        numbers = [number for number, (owner, _) in owners.items() if owner is ticket]
        for number in numbers:
            engine.cancel(number)
            del owners[number]
        if numbers:
            self._tell(self._finished, ticket, len(numbers))
