"""Request scheduler: admission, the engine thread, and the event loop's view of it.

Which requests are decoded together is decided in `generation.engine.Engine.step`.

Two threads, and what each runs:

- The event loop's thread (the main thread, `server._serve`): admission, counting, handles, and the observer. It never
  touches the engine once it is built. All counting happens here, so that admission needs no locks.
- The engine thread (started by `Scheduler.start`, its body is `_run_engine_thread`): builds the engine, then admits and
  cancels requests and runs decoding steps. Of the server only this thread uses MindSpore; with what else computes in
  the process it takes turns (`runtime.COMPUTING`).

Life of a request:

1. event loop: `submit` counts the requests as open and puts an `_Add` into the command queue.
2. engine thread: between two steps `_add` hands them to the engine; `_on_admitted` tells the event loop.
3. engine thread: `engine.step` gives every text a token and reads a block of a prompt; the events go to `_on_events`.
4. event loop: `_on_events` puts each event into its request's handle and counts the finished ones. A request that the
   engine could not go on with fails there alone.
5. event loop: `close` of a handle with unfinished requests queues a `_Cancel`; they count as open until the engine
   thread has freed their slots.

An exception that the engine lets out of a step fails the requests that are in it, each with an id under which the log
has the traceback; the engine is empty then, and serves on.

Results of the engine thread reach the event loop through `call_soon_threadsafe` (`_call_on_event_loop`), in order.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Protocol

from pangu_sigma.data.tokenizers.tokenizer import Tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.generation import Event, Request
from pangu_sigma.runtime import COMPUTING
from pangu_sigma.serving.api_errors import bad_request, busy, internal, shutting_down
from pangu_sigma.serving.request_handle import RequestHandle
from pangu_sigma.serving.server_settings import ServerLimits


class DecodingEngine(Protocol):
    """Interface of the engine that the scheduler drives: `pangu_sigma.generation.engine.Engine`.

    window: longest text in tokens. active, waiting: requests that hold a slot, that wait for one.
    """

    tokenizer: Tokenizer
    window: int
    active: int
    waiting: int
    idle: bool

    def add(self, request: Request) -> int:
        """Queue a request and return its id. Raises UserError."""

    def cancel(self, request_id: int) -> None:
        """Cancel a request and free its slot."""

    def step(self) -> list[Event]:
        """Decode one token of every text, admit requests that wait, and read one block of a prompt."""


class SchedulerObserver(Protocol):
    """Receiver of the scheduler's measurements, called on the event loop: `server_metrics.ServerMetrics`."""

    def state(self, active: int, waiting: int) -> None:
        """Requests that hold a slot and that wait, now."""

    def stepped(self, seconds: float, tokens: int) -> None:
        """A decoding step took `seconds` and wrote `tokens`."""

    def answered(self, seconds: float) -> None:
        """A request finished, `seconds` after it was submitted."""

    def failed(self, domain: str) -> None:
        """The model could not continue a request."""


@dataclass(frozen=True)
class _Add:
    """Command to the engine thread: admit a handle's requests."""

    handle: RequestHandle


@dataclass(frozen=True)
class _Cancel:
    """Command to the engine thread: cancel a handle's unfinished requests."""

    handle: RequestHandle


_STOP = None


class Scheduler:
    """Scheduler: admits up to `limits.slots` (decoded at once) + `limits.queue` (waiting) requests and lets the engine
    thread decode them together.

    `build` makes the engine, in the engine thread. `observer` is called on the event loop. All public methods are for
    the event loop's thread.
    """

    def __init__(self, build: Callable[[], DecodingEngine], limits: ServerLimits, observer: SchedulerObserver) -> None:
        self.limits = limits
        self.draining = False
        self.active = self.waiting = 0
        self._build = build
        self._observer = observer
        self._commands: queue.SimpleQueue[_Add | _Cancel | None] = queue.SimpleQueue()
        self._open = 0  # requests submitted whose end the engine thread has not reported
        self._handles: set[RequestHandle] = set()
        self._nothing_open = asyncio.Event()
        self._nothing_open.set()
        self.closing = asyncio.Event()  # set when requests that are not answered yet never will be
        self._mean_request_seconds = 1.0  # moving average, for Retry-After

    async def start(self) -> DecodingEngine:
        """Start the engine thread, which builds the engine and serves; the engine is returned for its constants only.

        Raises what `build` raises. `failed` is a future that holds the exception if the engine thread ends by one
        later.
        """
        self._loop = asyncio.get_running_loop()
        self._built: asyncio.Future[DecodingEngine] = self._loop.create_future()
        self.failed: asyncio.Future[BaseException] = self._loop.create_future()
        # A daemon: a step or a compilation under way must not block shutdown.
        # In this thread's context, so that it shows, or hides, progress as this one does.
        body = (self._run_engine_thread,)
        self._thread = threading.Thread(target=copy_context().run, args=body, name="engine", daemon=True)
        self._thread.start()
        return await self._built

    def submit(self, requests: Sequence[Request]) -> RequestHandle:
        """Submit requests, all or none. Raises ApiError: 429 when they do not fit now, 503 while draining."""
        if self.draining or self.failed.done():
            raise shutting_down()
        room = self.limits.slots + self.limits.queue
        if len(requests) > min(room, self.limits.choices):
            most = min(room, self.limits.choices)
            raise bad_request(f"one request may ask for {most} answers (prompts × n), not {len(requests)}", "n")
        if self._open + len(requests) > room:
            raise busy(self._retry_after())
        handle = RequestHandle(requests, self._release)
        self._change_open(len(requests))
        self._handles.add(handle)
        self._commands.put(_Add(handle))
        return handle

    @property
    def open(self) -> int:
        """Requests that were admitted and have not ended."""
        return self._open

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait until those that run have finished. True if they did within `seconds`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._nothing_open.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def abandon(self) -> None:
        """Fail every unfinished request, and what still arrives, with the error that the server is shutting down."""
        self.closing.set()
        for handle in list(self._handles):
            handle.accept(shutting_down())
            handle.put(shutting_down())

    async def stop(self, seconds: float | None = 5.0) -> None:
        """End the engine thread after its current step, and wait so many seconds for that (None: till it is over)."""
        self.draining = True
        self._commands.put(_STOP)
        await asyncio.to_thread(self._thread.join, seconds)

    # On the event loop's thread: called by handles, and by the engine thread through `_call_on_event_loop`.

    def _release(self, handle: RequestHandle) -> None:
        self._handles.discard(handle)
        if handle.unfinished:
            self._commands.put(_Cancel(handle))

    def _change_open(self, change: int) -> None:
        self._open += change
        if self._open:
            self._nothing_open.clear()
        else:
            self._nothing_open.set()

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self._mean_request_seconds * (self._open + 1) / self.limits.slots)))

    def _end_requests(self, handle: RequestHandle, count: int = 1) -> None:
        handle.unfinished -= count
        self._change_open(-count)

    def _on_built(self, result: DecodingEngine | BaseException) -> None:
        if self._built.cancelled():
            return
        if isinstance(result, BaseException):
            self._built.set_exception(result)
        else:
            self._built.set_result(result)

    def _on_admitted(self, handle: RequestHandle, error: Exception | None) -> None:
        if error is None:
            handle.accept(None)
            return
        self._end_requests(handle, handle.unfinished)
        is_mistake = isinstance(error, UserError)
        handle.accept(bad_request(str(error)) if is_mistake else internal(error, "the admission of a request"))

    def _on_events(self, events: list[tuple[RequestHandle, int, Event]], seconds: float) -> None:
        self._observer.stepped(seconds, sum(event.token_id is not None for _, _, event in events))
        for handle, index, event in events:
            if event.exception is None:
                handle.put((index, event))
            else:
                handle.put(internal(event.exception, f"a text of {handle.requests[index].domain}"))
            if event.error is not None:
                self._end_requests(handle)
                self._observer.failed(handle.requests[index].domain)
            elif event.finish is not None:
                self._end_requests(handle)
                seconds_open = handle.age
                self._mean_request_seconds += 0.1 * (seconds_open - self._mean_request_seconds)
                self._observer.answered(seconds_open)

    def _on_step_failure(self, handles: Sequence[RequestHandle], error: Exception) -> None:
        for handle in handles:
            if handle.unfinished:
                self._observer.failed(handle.requests[0].domain)
                handle.put(internal(error, f"a step with a text of {handle.requests[0].domain}"))
                self._end_requests(handle, handle.unfinished)

    def _on_state(self, active: int, waiting: int) -> None:
        self.active, self.waiting = active, waiting
        self._observer.state(active, waiting)

    def _on_engine_failure(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)
        error_for_clients = internal(error, "the engine")
        for handle in list(self._handles):
            handle.accept(error_for_clients)
            handle.put(error_for_clients)

    # On the engine thread.

    def _call_on_event_loop(self, method: Callable[..., None], *arguments: object) -> None:
        # The loop is closed only when the process ends without waiting for this thread.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(method, *arguments)

    def _run_engine_thread(self) -> None:
        try:
            with COMPUTING:
                engine = self._build()
        except BaseException as error:  # re-raised in the main thread
            self._call_on_event_loop(self._on_built, error)
            return
        self._call_on_event_loop(self._on_built, engine)
        try:
            self._run_steps(engine)
        except BaseException as error:
            self._call_on_event_loop(self._on_engine_failure, error)

    def _run_steps(self, engine: DecodingEngine) -> None:
        owners: dict[int, tuple[RequestHandle, int]] = {}
        while True:
            while engine.idle or not self._commands.empty():
                command = self._commands.get()
                if command is _STOP:
                    return
                if isinstance(command, _Add):
                    self._add(engine, command.handle, owners)
                else:
                    self._cancel(engine, command.handle, owners)
                self._call_on_event_loop(self._on_state, engine.active, engine.waiting)
            try:
                with COMPUTING:
                    began = time.perf_counter()
                    events = engine.step()
                    seconds = time.perf_counter() - began
            except Exception as error:
                self._drop_all(engine, owners, error)
                continue
            owned_events = [(*owners[event.request_id], event) for event in events]
            for event in events:
                if event.finish is not None:
                    del owners[event.request_id]
            self._call_on_event_loop(self._on_state, engine.active, engine.waiting)
            self._call_on_event_loop(self._on_events, owned_events, seconds)

    def _add(self, engine: DecodingEngine, handle: RequestHandle, owners: dict[int, tuple[RequestHandle, int]]) -> None:
        request_ids: list[int] = []
        try:
            for request in handle.requests:
                request_ids.append(engine.add(request))
        except Exception as error:
            for request_id in request_ids:
                engine.cancel(request_id)
            self._call_on_event_loop(self._on_admitted, handle, error)
            return
        owners.update({request_id: (handle, index) for index, request_id in enumerate(request_ids)})
        self._call_on_event_loop(self._on_admitted, handle, None)

    def _cancel(
        self, engine: DecodingEngine, handle: RequestHandle, owners: dict[int, tuple[RequestHandle, int]]
    ) -> None:
        request_ids = [request_id for request_id, (owner, _) in owners.items() if owner is handle]
        for request_id in request_ids:
            engine.cancel(request_id)
            del owners[request_id]
        if request_ids:
            self._call_on_event_loop(self._end_requests, handle, len(request_ids))

    def _drop_all(
        self, engine: DecodingEngine, owners: dict[int, tuple[RequestHandle, int]], error: Exception
    ) -> None:
        """Empty an engine whose step raised: nobody knows what it has done."""
        for request_id in owners:
            engine.cancel(request_id)
        handles = {id(handle): handle for handle, _ in owners.values()}
        owners.clear()
        self._call_on_event_loop(self._on_state, engine.active, engine.waiting)
        self._call_on_event_loop(self._on_step_failure, list(handles.values()), error)
